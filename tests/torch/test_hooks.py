"""Registration of hooks: in one place, all or none."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from ipa_torch._capture.hooks import Hook, HookSet

PACKAGE = Path(__file__).parents[2] / "integrations" / "ipa_torch"


def hooks_of(module):
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def test_before_and_after_with_keywords():
    calls = []
    layer = nn.Linear(3, 2)

    def before(module, args, kwargs):
        calls.append(("before", module, tuple(kwargs)))

    def after(module, args, kwargs, output):
        calls.append(("after", module, tuple(output.shape)))

    with HookSet([Hook("a", layer, before), Hook("a", layer, after, after=True)]) as hooks:
        layer(input=torch.ones(4, 3))
        hooks.remove("a")
        hooks.remove("a")
        layer(torch.ones(4, 3))
    assert calls == [("before", layer, ("input",)), ("after", layer, (4, 2))]


def test_first_is_called_before_the_hooks_that_are_there():
    order = []
    layer = nn.ReLU()
    layer.register_forward_pre_hook(lambda *_: order.append("there"))
    with HookSet([Hook(None, layer, lambda *_: order.append("first"), first=True)]):
        layer(torch.ones(1))
    assert order == ["first", "there"]


def test_all_are_registered_or_none():
    class Refusing(nn.ReLU):
        def register_forward_hook(self, *args, **kwargs):
            raise RuntimeError("no hooks here")

    modules = [nn.ReLU(), nn.ReLU(), Refusing()]
    hooks = HookSet(Hook(str(i), m, print, after=i == 2) for i, m in enumerate(modules))
    with pytest.raises(RuntimeError, match="no hooks here"), hooks:
        pass
    assert not any(map(hooks_of, modules))


def test_all_are_removed_after_an_error():
    modules = [nn.ReLU(), nn.ReLU()]
    hooks = HookSet(Hook(None, module, print) for module in modules)
    with pytest.raises(KeyError), hooks:
        raise KeyError
    assert not any(map(hooks_of, modules))


def test_one_file_registers_hooks():
    """Apart from the permanent hooks of adapter layers and of their lock."""
    pattern = re.compile(r"register_(?:module_)?(?:full_)?(?:forward|backward)\w*\(")
    files = [path for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text())]
    found = {path.relative_to(PACKAGE).as_posix() for path in files}
    assert found == {
        "_adapters/layer_replacement.py",
        "_adapters/pass_lock.py",
    }  # and hooks.py, by a name
    assert "register_forward" in (PACKAGE / "_capture" / "hooks.py").read_text()
