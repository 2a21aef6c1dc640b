"""Which package may import which, and what the library must not load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import CHECKOUT

PACKAGES = ("common", "zclip", "models", "data", "evaluation", "training", "experiments", "scripts", "hydra_plugins")
MAY_IMPORT = {
    "common": {"common"},
    "zclip": {"zclip"},
    "models": {"models", "common"},
    "data": {"data", "common"},
    "evaluation": {"evaluation", "models", "data", "common"},
    "training": {"training", "zclip", "models", "data", "evaluation", "common"},
    "experiments": {"experiments", "common"},
}
#: Files that may import further packages: a control of the labs is a rule that runs in training.
LAB_RULES = ("gradient_brake", "later_rate", "replayed_scales", "skipping_log_z_score")
FURTHER = {f"experiments/labs/{name}.py": {"zclip"} for name in LAB_RULES}
#: Inside training/, from the lowest layer to the highest: a module imports its own layer and those below.
LAYERS = (
    "runtime", "muon", "config", "run_dir", "checkpoint", "monitor", "validation", "module", "launch", "callback",
    "run",
)  # fmt: skip
#: Parts of a run, which do not know each other.
PARTS = ("checkpoint", "monitor", "validation")
#: The only files that know Hydra's container.
KNOW_HYDRA = {"train.py", "training/config/compose.py"}
HEAVY = {
    "lightning",
    "pytorch_lightning",
    "transformers",
    "hydra",
    "omegaconf",
    "pydantic",
    "wandb",
    "numpy",
    "tokenizers",
}


def modules(folder: str) -> list[Path]:
    return sorted((CHECKOUT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names of modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                inner = CHECKOUT.joinpath(*f"{node.module}.{alias.name}".split("."))
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_respect_import_boundaries(package):
    assert modules(package)
    for file in modules(package):
        name = str(file.relative_to(CHECKOUT))
        allowed = MAY_IMPORT[package] | FURTHER.get(name, set())
        outside = {imported.split(".")[0] for imported in imports(file)} & {*PACKAGES, "tests", "train"} - allowed
        assert not outside, f"{name} imports {outside}"


def test_experiments_read_runs_without_the_paper():
    for file in modules("experiments/run"):
        upward = [name for name in imports(file) if name.startswith("experiments.paper")]
        assert not upward, f"{file.relative_to(CHECKOUT)} imports {upward}"


#: Packages that `make train` does not install: those of the extras eval, paper and dev.
NOT_FOR_TRAINING = {"lm_eval", "transformers", "scipy", "jinja2", "accelerate", "hypothesis", "pytest"}
#: Modules that a run imports only to score tasks.
FOR_TASKS = {"evaluation/language_model.py", "evaluation/hugging_face_lm.py"}


def test_training_loads_without_the_packages_of_other_extras():
    files = [
        file
        for name in ("common", "data", "models", "training", "evaluation", "experiments/run")
        for file in modules(name)
    ]
    assert len(files) > 50
    for file in [
        *files,
        CHECKOUT / "train.py",
        CHECKOUT / "scripts" / "compare.py",
        CHECKOUT / "scripts" / "status.py",
    ]:
        if str(file.relative_to(CHECKOUT)) in FOR_TASKS:
            continue
        loaded = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in loaded for alias in node.names if isinstance(node, ast.Import)}
        names |= {str(node.module) for node in loaded if isinstance(node, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in names} & NOT_FOR_TRAINING, file


def test_training_imports_downward():
    for file in modules("training"):
        own = name_of(file).split(".")[1:2]
        if not own or own[0] == "lightning_internals":
            continue
        assert own[0] in LAYERS, f"{file.relative_to(CHECKOUT)} is in no layer of this test"
        for name in imports(file):
            package, _, rest = name.partition(".")
            layer = rest.split(".")[0]
            if package != "training" or layer == "lightning_internals":
                continue
            message = f"{file.relative_to(CHECKOUT)} imports {name}, which is above it"
            assert LAYERS.index(layer) <= LAYERS.index(own[0]), message
            assert {own[0], layer} - {*PARTS} or own[0] == layer, f"{own[0]}/ and {layer}/ know each other: {file.name}"


def test_no_import_circles():
    graph = {name_of(file): set(imports(file)) for package in PACKAGES for file in modules(package)}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle of imports: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done or name not in graph:
            return
        for other in sorted(graph[name] - {name}):
            # A package's __init__ gathers its modules, which may import each other but not it.
            visit(other, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_few_files_know_the_configuration_container():
    files = [path for path in CHECKOUT.rglob("*.py") if ".venv" not in path.parts and "tests" not in path.parts]
    for path in files:
        relative = path.relative_to(CHECKOUT).as_posix()
        if relative not in KNOW_HYDRA and not relative.startswith("hydra_plugins/"):
            assert "DictConfig" not in path.read_text(), f"{relative} knows DictConfig: it takes a typed section"


def test_ground_floor_needs_little():
    libraries = {
        "settings.py": {"pydantic", "pydantic_core"},
        "reading.py": {"pydantic", "yaml"},
        "run_files.py": {"pydantic"},
        "files.py": {"filelock"},
        "console.py": {"rich"},
    }
    for file in modules("common"):
        allowed = {"common"} | libraries.get(file.name, set())
        outside = {name.split(".")[0] for name in imports(file)} - {*sys.stdlib_module_names} - allowed
        assert not outside, f"{file.relative_to(CHECKOUT)} imports {outside}"


def test_library_needs_torch_alone_outside_its_integrations():
    for file in modules("zclip"):
        if "integrations" not in file.parts:
            outside = {name.split(".")[0] for name in imports(file)} - {*sys.stdlib_module_names, "zclip", "torch"}
            assert not outside, f"{file.relative_to(CHECKOUT)} imports {outside}"


def test_importing_zclip_loads_no_framework():
    code = f"import sys; from zclip import ZClip; ZClip(); print(sorted({HEAVY!r} & set(sys.modules) - {{'numpy'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "[]"


def test_lightning_callbacks_are_found_at_the_top():
    from zclip import ClippingCallback, ZClip, ZClipLightningCallback
    from zclip_lightning_callback import ZClipLightningCallback as Same

    assert Same is ZClipLightningCallback
    callback = ZClipLightningCallback(alpha=0.9, z_thresh=3.0)
    assert isinstance(callback, ClippingCallback)
    assert isinstance(callback.zclip, ZClip)
    assert callback.zclip.alpha == 0.9
