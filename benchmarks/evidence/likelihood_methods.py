"""The methods that are compared by the likelihood of held-out text."""

from dataclasses import replace
from functools import partial

from peft import EvaConfig

from benchmarks.evidence import captured
from benchmarks.evidence.captured import Rule
from benchmarks.evidence.methods import METHODS, Method
from benchmarks.evidence.training import Plan


def of_inputs(**options: object) -> Method:
    """Return a frozen A of the inputs, by other rows or in other sizes."""
    rule: Rule = partial(captured.inputs, **options)
    return Method(trainable=False, rule=rule)


def of_gradient(rule: Rule, **options: object) -> Method:
    """Return a frozen A of the gradient."""
    return Method(trainable=False, rule=partial(rule, **options), gradients=True)


WITHOUT_FIRST = of_inputs(weighting=captured.without_first)
FLAT = of_inputs(weighting=captured.without_first, power=0.5)
HELD = Plan(held_after=0.1)
FIRST_STEP = Plan(first_step="gradient")
FIRST_SIGN = Plan(first_step="sign")
FISHER = of_gradient(captured.fisher)

#: What is run on every kind of text.
MAIN: dict[str, Method] = {
    **{
        name: METHODS[name]
        for name in (
            "LoRA",
            "LoRA, half rank",
            "DoRA",
            "PiSSA",
            "EVA",
            "IPA, trainable",
            "random A, frozen",
            "orthonormal, frozen",
            "IPA, frozen",
        )
    },
    "IPA without first token, frozen": WITHOUT_FIRST,
    "IPA unit rows, frozen": of_inputs(weighting=captured.unit),
    "IPA capped rows, frozen": of_inputs(weighting=captured.capped),
    "damped gradient, frozen": of_gradient(captured.damped),
    "half inputs, half damped gradient": of_gradient(captured.damped, share=0.5),
    "Fisher, frozen": FISHER,
}
#: How B is trained along a frozen A, and A for a while.
TRAINING: dict[str, Method] = {
    "IPA without first token, power 0.25, frozen": of_inputs(
        weighting=captured.without_first, power=0.25
    ),
    "IPA without first token, power 0.5, frozen": FLAT,
    "IPA without first token, power 1, frozen": of_inputs(
        weighting=captured.without_first, power=1.0
    ),
    "IPA, power 0.5, frozen": of_inputs(power=0.5),
    "IPA without first token, LoRA-FA optimizer": replace(
        WITHOUT_FIRST, plan=Plan(optimizer="lorafa")
    ),
    "random A, LoRA-FA optimizer": Method(trainable=False, plan=Plan(optimizer="lorafa")),
    "IPA without first token, first step, frozen": replace(WITHOUT_FIRST, plan=FIRST_STEP),
    "IPA without first token, first sign step, frozen": replace(WITHOUT_FIRST, plan=FIRST_SIGN),
    "IPA, first sign step, frozen": replace(METHODS["IPA, frozen"], plan=FIRST_SIGN),
    "random A, first sign step, frozen": Method(trainable=False, plan=FIRST_SIGN),
    "LoRA, first sign step": Method(plan=FIRST_SIGN),
    "LoRA, half rank, first sign step": Method(rank=0.5, plan=FIRST_SIGN),
    "IPA without first token, first sign step, trainable": replace(
        WITHOUT_FIRST, trainable=True, plan=FIRST_SIGN
    ),
    "IPA without first token, rank doubled, first sign step, frozen": replace(
        WITHOUT_FIRST, rank=2, plan=FIRST_SIGN
    ),
    "random A, first step, frozen": Method(trainable=False, plan=FIRST_STEP),
    "LoRA, first step": Method(plan=FIRST_STEP),
    "IPA without first token, first step, trainable": replace(
        WITHOUT_FIRST, trainable=True, plan=FIRST_STEP
    ),
    "IPA without first token, rank doubled, frozen": replace(WITHOUT_FIRST, rank=2),
    "random A, rank doubled, frozen": Method(trainable=False, rank=2),
    "IPA without first token, trainable": replace(WITHOUT_FIRST, trainable=True),
    "LoRA, a tenth, then frozen": Method(plan=HELD),
    "IPA without first token, a tenth, then frozen": replace(
        WITHOUT_FIRST, trainable=True, plan=HELD
    ),
    "LoRA, a tenth at 0.3 times B's rate, then frozen": Method(
        plan=Plan(held_after=0.1, rate_of_a=0.3)
    ),
    "IPA standardized, frozen": Method(trainable=False, rule=captured.standardized),
    "IPA standardized directions, frozen": Method(
        trainable=False, rule=partial(captured.standardized, divided=False)
    ),
    "column gradient, frozen": of_gradient(captured.column_gradient),
    "short update, frozen": METHODS["short update, frozen"],
    "LoRA, rate of B 4 times A's": Method(plan=Plan(rate_of_a=0.25)),
    "Fisher equal sizes, frozen": of_gradient(captured.fisher, sized=0.0),
    "Fisher root sizes, frozen": of_gradient(captured.fisher, sized=0.5),
    "Fisher, first step, frozen": replace(FISHER, plan=FIRST_STEP),
    "Fisher, trainable": replace(FISHER, trainable=True),
    "damped gradient without first token, frozen": of_gradient(
        captured.damped, weighting=captured.without_first
    ),
    "half of each without first token, frozen": of_gradient(
        captured.damped, weighting=captured.without_first, share=0.5
    ),
    "IPA without first token, power 0.5, rank doubled, frozen": replace(FLAT, rank=2),
}
#: A trainable P beside EVA: sizes of A's rows, rates of A, ranks spread over layers.
STARTED: dict[str, Method] = {
    "IPA without first token, long rows, trainable": replace(
        WITHOUT_FIRST, trainable=True, scaling=1.0
    ),
    "IPA without first token, a tenth of B's rate, trainable": replace(
        WITHOUT_FIRST, trainable=True, plan=Plan(rate_of_a=0.1)
    ),
    "EVA, equal ranks": Method("eva", options={"eva_config": EvaConfig(rho=1.0)}),
}
#: LoRA that keeps about as much for the backward pass as a frozen A in all adapted blocks.
NARROWED = {"LoRA, upper half of the blocks": Method(layers=0.5)}
#: One criterion for inputs and gradient, by the weight of the inputs.
MIXED = {
    f"inputs and gradient, beta {beta:g}, frozen": of_gradient(captured.mixed, beta=beta)
    for beta in (0.1, 1.0, 10.0)
}
LIKELIHOOD = MAIN | TRAINING | STARTED | NARROWED | MIXED
