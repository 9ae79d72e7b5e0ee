"""Rules of the language in code and documentation, and a checker that applies them to a text.

The terms are those of torch, PEFT and scikit-learn; the spelling is American. `check` returns a
line for each violation, with the place and the cure.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("ipa_core", "integrations")

#: Identifiers of earlier versions and their replacements. They are refused wherever they stand.
NAMES = {
    "Adapted": "AdapterLayer",
    "Asked": "PendingBatch",
    "Checkpoints": "CheckpointConfig",
    "Company": "FitProcessGroup",
    "Glance": "PendingSketch",
    "GradientPupil": "MergeableLearner",
    "Histories": "SharedInputTree",
    "Identities": "TensorIds",
    "Journal": "CheckpointWriter",
    "LastAxis": "LinearView",
    "Listener": "ActivationCollector",
    "Members": "ProcessGroupArg",
    "Mergeable": "MergeableLearner",
    "Patches": "ConvView",
    "Projectors": "LayerProjectors",
    "Reading": "MatmulView",
    "RowFilter": "RowWeighter",
    "Selection": "RowSelection",
    "Standing": "CollectorState",
    "Turn": "MemoryPass",
    "WeightWatch": "WeightUseTracer",
    "_Kept": "RowBuffer",
    "_Open": "PendingUpdate",
    "_Sizes": "_ShapeProbe",
    "_Steps": "_Lockstep",
    "_WELL": "_OK",
    "_answers_late": "is_async_device",
    "_ends": "block_ends",
    "_familiar": "_count_explained_rows",
    "_forgiving": "_drop_failed_layer",
    "_glance": "_begin_sketch",
    "_hear": "_forward_pre_hook",
    "_look": "_begin_sketch",
    "_lost": "_share_outside_span",
    "_missed": "_residual_energy",
    "_nothing": "_noop_hook",
    "_plain": "unwrap_model",
    "_settle": "_finish_pending",
    "_space": "_rows_left",
    "_spare": "_factor_rows",
    "_stepped": "_rows_stepped",
    "_told": "_broadcast_projector",
    "_waiting": "_pending_rows",
    "_watched": "_seen_energy",
    "_watched_weight": "_seen_weight",
    "_whole": "_whole_rows",
    "adapters_of": "list_adapters",
    "agreed": "merge_across_ranks",
    "ask_squares": "row_norms_async",
    "contents_of": "tensor_key",
    "energy_of": "energy_scale",
    "equal_to": "find_equal_projection",
    "full_precision": "no_autocast",
    "heads_of": "classifier_modules",
    "heard": "has_samples",
    "held_bytes": "measure_learner_bytes",
    "in_step": "lockstep",
    "jumps": "lost_share",
    "layer_of": "get_layer",
    "lifts": "lora_B",
    "masses": "host_weights",
    "on_its_way": "to_host_async",
    "pupil": "learner",
    "rank_for": "rank_for_energy or resolve_rank",
    "scale_of": "resolve_scale",
    "storage_of": "storage_key",
    "turned_towards": "procrustes_align",
    "turns_within": "split_by_memory",
    "undisturbed": "eval_mode",
    "unfit": "failed",
}

#: Names that are ordinary words elsewhere, refused for functions and classes of the packages.
DEFINITIONS = {
    "Chosen": "RowSelection",
    "Node": "InputPrefix",
    "Run": "RowChunks",
    "accept": "validate",
    "answered": "result",
    "carry": "change_basis",
    "caught": "captured_energy",
    "disabled": "disable_adapter",
    "expect": "prefetch",
    "factor": "resolve_scale",
    "feed": "default_forward",
    "fitted": "truncate_to_layer",
    "heads": "take_first",
    "held": "fixed_rows",
    "hold": "freeze_batchnorm_stats or set_lora_A_frozen",
    "initialize": "initialize_lora_ipa_weights",
    "kind": "layer_kind",
    "leading": "row_shape",
    "least": "all_reduce_min",
    "matrices": "lora_A_and_B",
    "note": "record_batch",
    "own": "copy",
    "pairs": "rows_and_grads",
    "place": "write_lora_A",
    "plain": "unwrap_model",
    "prepare": "preprocess",
    "resumed": "skip_seen",
    "scaled": "sqrt_weighted",
    "separate": "use_separate_qkv_bias",
    "separated": "separate_qkv_bias",
    "settle": "prepare_for_training",
    "silent": "ignore_overflow",
    "spread": "stratified_indices",
    "standing": "snapshot",
    "summary": "table or compact",
    "thaw": "unfreeze",
    "weigh": "apply_weights",
    "wrapped": "adapter_layers",
}

#: Pronouns and participles that are no names of things, refused as variables of the packages.
VARIABLES = ("found", "made", "one", "own")

#: Modules of earlier versions, by package.
MODULES = {
    "ipa_core": "_batch|_rows|_sequential|dependencies|on_dask|quality|ranks|storage|store",
    "ipa_hf": "adapters|attached_metadata|base_forward|fitting|layers|lora_options|lost_lora|"
    "metadata_file|peft_targets|placing|ranks|record|samples|storage|tied_adapters|weights",
    "ipa_timm": "adapting|fitting|heads|images|same|separating|statistics|storage",
    "ipa_torch": "adapted|adapters|agreeing|bypass|carrying|checkpointing|company|damping|feeding|"
    "fingerprints|fit|gradient|identity|inputs|listening|memory|online|projection|quiet|reading|"
    "saving|sharing|sketch|standing|stopping|storing|targets|turns|weighting|wire|wrapping",
}
_MODULE = re.compile("|".join(rf"\b{p}[./](?:{names})\b(?!\()" for p, names in MODULES.items()))

#: Modules named by an activity that is a term of the field.
ACTIVITIES = {
    "early_stopping",
    "expert_routing",
    "freezing",
    "online_learning",
    "plotting",
    "preprocessing",
    "same_padding",
}

#: First words of a docstring that ask a question or refer to an unnamed thing.
_OPENING = re.compile(
    r"(What|Whatever|Whether|How|Which|When|Where|Who|Whose|Why|It|Its|They|Their|This|That|These|"
    r"Those|One|He|She|We|Our|You|Your)\b"
)

_STEMS = (
    "behaviour|centr(?:e|ed|es|ing)(?![a-z])|colour|favour|honour|labour|neighbour|grey|catalogue|"
    "(?:label|model|cancel|travel|signal)l(?:ed|ing)|artefact|judgement|programme(?![rd])|"
    "(?:analy|paraly)s(?:e|ed|ing)(?![a-z])|"
    "(?:final|general|initial|local|material|minim|maxim|normal|optim|organ|orthogonal|orthonormal|"
    "parallel|penal|quant|random|real|recogn|regular|serial|special|stabil|standard|summar|"
    "symmetr|synchron|token|util|vector|visual)is(?:e|ed|er|ers|es|ing|ation|ations)(?![a-z])"
)
#: Also within identifiers: `_`, and a word in a name in camel case, begin a word.
_BRITISH = re.compile(rf"(?<![a-z])(?:de|un|re|sub|non)?(?:{_STEMS})", re.IGNORECASE)

#: Private metaphors in prose, each with the term of the field.
PHRASES = {
    r"who(?:m?ever)": "the thing itself",
    r"company": "process group",
    r"members?": "ranks",
    r"pupils?": "learner",
    r"listeners?": "collector",
    r"hear(?:s|d|ing)?": "observe, or: a hook receives",
    r"settle[sd]?": "finish",
    r"in turns|(?:a|one|each|its|their) turn|turns? of layers": "memory passes",
    r"(?:its|their|the) standing|where \w+ stands?": "state",
    r"carr(?:y|ies|ied|ying) (?:B|it|them)\b|carried along|basis is carried": "change of basis",
    r"lifts?": "lora_B",
    r"thaw(?:s|ed)?": "unfreeze",
    r"read(?:s|ing)? past": "use the weight without calling the layer",
    r"nobody|for ever|as if nothing": "the plain statement",
    r"how alike|likeness": "similarity",
    r"begins? as (?:in )?LoRA|begun (?:as|again|with)": "initialized",
    r"goes? no further": "stops",
}
_PHRASES = {re.compile(rf"(?<![\w`./-])(?:{p})(?![\w`-])", re.I): c for p, c in PHRASES.items()}


def check(path: Path, text: str) -> list[str]:
    """Return a line for each violation in a text, as ``path:line: what; cure``.

    Parameters
    ----------
    path : Path
        Relative to the root of the repository; its suffix decides between Python and Markdown.
    text : str
    """
    rules = [_spelling(text), _modules(text)]
    if path.suffix == ".py":
        rules += [_names(text), _openings(text), _prose(_python_prose(text))]
        if path.parts[0] in PACKAGES:
            rules += [_definitions(text), _file_name(path)]
    else:
        rules += [_code_spans(enumerate(text.splitlines(), 1)), _prose(_markdown_prose(text))]
    return [
        f"{path}:{line}: {problem}"
        for line, problem in sorted({violation for rule in rules for violation in rule})
    ]


Violations = Iterator[tuple[int, str]]


def _spelling(text: str) -> Violations:
    for line, content in enumerate(text.splitlines(), 1):
        for match in _BRITISH.finditer(content):
            yield line, f"{match[0]!r} is British spelling; write it in American spelling"


def _modules(text: str) -> Violations:
    for line, content in enumerate(text.splitlines(), 1):
        for match in _MODULE.finditer(content):
            yield line, f"{match[0]!r} is a module of earlier versions; name the present one"


def _names(text: str) -> Violations:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and token.string in NAMES:
            yield token.start[0], _replace(token.string, NAMES)
    yield from _code_spans(_python_prose(text))


def _code_spans(lines: Iterator[tuple[int, str]]) -> Violations:
    for line, content in lines:
        for span in re.findall(r"`([^`]+)`", content):
            for name in re.findall(r"[A-Za-z_]\w*", span):
                if name in NAMES:
                    yield line, _replace(name, NAMES)


def _definitions(text: str) -> Violations:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in DEFINITIONS:
            yield node.lineno, _replace(node.name, DEFINITIONS)
        name = node.id if isinstance(node, ast.Name) else getattr(node, "arg", None)
        if name in VARIABLES:
            yield node.lineno, f"variable {name!r} names no thing; use a noun"


def _file_name(path: Path) -> Violations:
    if path.stem.endswith("ing") and path.stem not in ACTIVITIES:
        yield 1, f"module {path.stem!r} is named by an activity; use a noun of the field"


def _openings(text: str) -> Violations:
    tree = ast.parse(text)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            if match := _OPENING.match(docstring):
                problem = f"the docstring opens with {match[0]!r}; name the thing, or use a verb"
                yield node.body[0].lineno, problem


def _prose(lines: Iterator[tuple[int, str]]) -> Violations:
    for line, content in lines:
        for pattern, cure in _PHRASES.items():
            if match := pattern.search(content):
                yield line, f"{match[0]!r} is no term of the field; say: {cure}"


def _python_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield comments and the lines of string constants with their line numbers."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for offset, content in enumerate(node.value.split("\n")):
                yield node.lineno + offset, content


def _markdown_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines outside of fenced code."""
    fenced = False
    for line, content in enumerate(text.splitlines(), 1):
        if content.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield line, content


def _replace(name: str, table: dict[str, str]) -> str:
    return f"{name!r} is a name of earlier versions; use {table[name]}"
