"""Who may import whom, and what the library must not load."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import CHECKOUT

ROOMS = {"common", "zclip", "models", "data", "training", "evaluation", "experiments", "scripts", "tests", "train"}
MAY_IMPORT = {
    "zclip": {"zclip"},
    "common": {"common"},
    "models": {"models", "common"},
    "data": {"data", "common"},
    "evaluation": {"evaluation", "models", "data", "common"},
    "training": {"training", "zclip", "models", "data", "evaluation", "common"},
    "experiments": {"experiments", "common"},
}
HEAVY = {
    "lightning",
    "pytorch_lightning",
    "transformers",
    "hydra",
    "omegaconf",
    "wandb",
    "numpy",
    "tokenizers",
}


def imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room):
    files = list((CHECKOUT / room).rglob("*.py"))
    assert files
    for file in files:
        strangers = (imports(file) & ROOMS) - MAY_IMPORT[room]
        assert not strangers, f"{file.relative_to(CHECKOUT)} imports {strangers}"


def test_the_library_needs_torch_alone_outside_its_integrations():
    for file in (CHECKOUT / "zclip").rglob("*.py"):
        if "integrations" not in file.parts:
            outside = imports(file) - set(sys.stdlib_module_names) - {"zclip", "torch"}
            assert not outside, f"{file.relative_to(CHECKOUT)} imports {outside}"


def test_importing_zclip_loads_no_framework():
    code = f"import sys; from zclip import ZClip; ZClip(); print(sorted({HEAVY!r} & set(sys.modules) - {{'numpy'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "[]"


def test_the_lightning_callbacks_are_found_at_the_top():
    from zclip import ClippingCallback, ZClip, ZClipLightningCallback
    from zclip_lightning_callback import ZClipLightningCallback as Same

    assert Same is ZClipLightningCallback
    callback = ZClipLightningCallback(alpha=0.9, z_thresh=3.0)
    assert isinstance(callback, ClippingCallback)
    assert isinstance(callback.zclip, ZClip)
    assert callback.zclip.alpha == 0.9
