"""Results of a fit, merged over the ranks of a process group."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import nn

from ipa_core import Learner, Projector
from ipa_core.caller_warnings import warn_caller
from ipa_torch._capture.batch_device import device_of
from ipa_torch._distributed.process_group import FitProcessGroup
from ipa_torch._fit.attention_head_learners import LayerLearner
from ipa_torch._fit.collector import NEVER_RAN, ActivationCollector, CollectorState
from ipa_torch.layer_projectors import LayerLearners, LayerProjectors, M


@dataclass(frozen=True)
class ResultKind(Generic[M]):
    """Results of a fit: their class, and their form as a state that ranks send."""

    kind: type[M]
    of_learner: Callable[[LayerLearner], Any]
    state_of: Callable[[LayerLearner], Mapping[str, Any]]
    of_state: Callable[[Mapping[str, Any], LayerLearner], Any]


def _finalize(learner: LayerLearner) -> Projector:
    assert isinstance(learner, Learner)
    return learner.finalize()


PROJECTORS = ResultKind(
    LayerProjectors,
    _finalize,
    lambda learner: vars(_finalize(learner)),
    lambda state, _: Projector(**state),
)
LEARNERS = ResultKind(
    LayerLearners,
    lambda learner: learner,
    lambda learner: learner.state_dict(),
    lambda state, learner: copy.copy(learner).load_state_dict(state),
)


def merge_results(
    fit_group: FitProcessGroup,
    collector: ActivationCollector[LayerLearner],
    layers: Mapping[str, nn.Module],
    reason: str,
    seen: int,
    interrupted: bool,
    returning: bool,
    result: ResultKind[M],
) -> M:
    """Return the results of the rows of all ranks, the same on every rank.

    Rows of a layer that failed in a rank do not count in this rank. When ``returning`` after
    errors, a layer whose learners do not merge is missing.

    Raises
    ------
    PeerError
        If another rank failed.
    EmptyStreamError
        If no rank had a batch.
    """
    fit_group.interrupted = interrupted
    if fit_group.group is None:
        return collector.finish(reason, result.of_learner, result.kind)
    state = collector.snapshot()
    report = _report(state, reason, seen) | {"interrupted": reason if interrupted else ""}
    reports = fit_group.exchange(report)
    fit_group.interrupted = any(each["interrupted"] for each in reports)
    groups = _common_groups(state, reports)
    learners = {names[0]: state.node_of[names[0]].learner for names in groups}
    errors: dict[str, str] = {}
    states = fit_group.merge_states(
        learners, result.state_of, excluded=state.failed, errors=errors if returning else None
    )
    learned: dict[str, Any] = {}
    for names in groups:
        name = names[0]
        if states[name] is not None:
            device = state.ran.get(name) or device_of(layers[name])
            merged = {key: _moved(value, device) for key, value in states[name].items()}
            learned |= dict.fromkeys(names, result.of_state(merged, learners[name]))
    ordered = {name: learned[name] for name in state.node_of if name in learned}
    unmerged = {name: errors[names[0]] for names in groups if names[0] in errors for name in names}
    missing = {
        name: unmerged.get(name) or _joined_reasons(reports, "missing", name, NEVER_RAN)
        for name in state.node_of
        if name not in learned
    }
    stopped = {name: _joined_reasons(reports, "stopped", name, reason) for name in ordered}
    _warn_of_excluded_rows(reports, ordered)
    return result.kind(ordered, missing=missing, stopped=stopped)


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _report(state: CollectorState[LayerLearner], reason: str, seen: int) -> dict[str, Any]:
    missing = {name: why for name in state.node_of if (why := state.missing(name)) is not None}
    groups = [names for _, names in state.groups()]
    stops = {name: state.stopped.get(name, reason) for name in state.node_of}
    return {
        "seen": seen,
        "layers": {name: node.learner.rank for name, node in state.node_of.items()},
        "groups": groups,
        "failed_layers": dict(state.failed),
        # The reasons of a rank without batches are not reported.
        "missing": missing if seen else {},
        "stopped": {name: why for name, why in stops.items() if name not in missing}
        | {name: f"failed in a process: {why}" for name, why in state.failed.items()},
    }


def _common_groups(
    state: CollectorState[LayerLearner], reports: list[dict[str, Any]]
) -> list[list[str]]:
    """Return groups of layers that shared their inputs on every rank, and failed on the same."""
    keys: dict[str, list[tuple[int, bool]]] = {name: [] for name in state.node_of}
    for report in reports:
        for number, names in enumerate(report["groups"]):
            for name in names:
                keys[name].append((number, name in report["failed_layers"]))
    groups: dict[tuple[tuple[int, bool], ...], list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(tuple(key), []).append(name)
    return list(groups.values())


def _warn_of_excluded_rows(reports: list[dict[str, Any]], learned: Mapping[str, Any]) -> None:
    """Warn if layers have a result without the rows of a rank in which they failed."""
    for rank, report in enumerate(reports):
        for name, why in report["failed_layers"].items():
            if name in learned:
                warn_caller(
                    f"{name!r} and perhaps other layers are learned without the rows of process "
                    f"{rank}, where they failed: {why}",
                )
                return


def _joined_reasons(reports: list[dict[str, Any]], kind: str, name: str, default: str) -> str:
    """Return the reasons of all ranks, each once."""
    reasons = dict.fromkeys(report[kind][name] for report in reports if name in report[kind])
    return " / ".join(reasons) or default
