"""SentenceTransformerTrainer trains MiniLM with a frozen P."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModel

import ipa_hf
from benchmarks.assets import minilm

from .outcome import check_loads, check_trained

st = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed: make test-trainers"
)
from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402

datasets = pytest.importorskip("datasets")
PAIRS = [
    {"anchor": "A cat sleeps.", "positive": "A cat is asleep."},
    {"anchor": "It rains.", "positive": "There is rain today."},
    {"anchor": "He plays chess.", "positive": "Chess is what he plays."},
    {"anchor": "The shop is shut.", "positive": "The store has closed."},
]


@pytest.mark.assets
def test_trains_minilm(tmp_path, results):
    transformer = Transformer(str(minilm()))
    modules = [transformer, Pooling(transformer.get_embedding_dimension())]
    model = st.SentenceTransformer(modules=modules, device="cpu")
    batches = [model.preprocess([pair["anchor"] for pair in PAIRS])]
    batches = [{name: x for name, x in batch.items() if torch.is_tensor(x)} for batch in batches]
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    model[0].model = ipa_hf.get_ipa_model(model[0].model, config, batches, progress=False)
    model[0].model.save_pretrained(tmp_path / "before")
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path / "checkpoints"),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
    )
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(PAIRS * 4),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    model.save_pretrained(str(tmp_path / "saved"))
    (saved,) = (path.parent for path in (tmp_path / "saved").rglob("adapter_model.safetensors"))
    check_trained(tmp_path / "before", saved)
    check_loads(AutoModel.from_pretrained(minilm()), saved, model[0].model)
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = ["A cat sleeps.", "It rains."]
    expected = model.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(again.encode(texts, convert_to_tensor=True), expected)
    results.add(
        "sentence-transformers",
        "SentenceTransformerTrainer",
        st.__version__,
        "equal to the bit",
        "yes",
    )
