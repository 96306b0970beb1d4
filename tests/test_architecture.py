"""The rules that keep the house in order: who may import whom, no copies, no giant files, nothing at import time."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Layer -> prefixes of `wan` it may import. The longest matching layer counts; a layer may import itself.
# wan.engine.optimizations and wan.families have one more rule each, below.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "wan.engine.errors": (),
    "wan.engine.types": ("wan.engine.errors",),
    "wan.engine.options": ("wan.engine.errors",),
    "wan.engine.hardware": ("wan.engine.errors",),
    "wan.engine.ops": ("wan.engine.types", "wan.engine.hardware", "wan.engine.errors", "wan.kernels"),
    "wan.engine.weights": ("wan.engine.types", "wan.engine.ops", "wan.engine.hardware", "wan.engine.errors"),
    "wan.engine.distributed": ("wan.engine.types", "wan.engine.ops", "wan.engine.hardware", "wan.engine.errors"),
    "wan.engine.arena": (),
    "wan.engine.adapting": ("wan.engine.ops", "wan.engine.weights"),
    "wan.engine.beside": ("wan.engine.adapting", "wan.engine.prediction", "wan.engine.weights"),
    "wan.engine.swapping": ("wan.engine.arena", "wan.engine.placement"),
    "wan.engine.placement": (
        "wan.engine.arena",
        "wan.engine.types",
        "wan.engine.ops",
        "wan.engine.hardware",
        "wan.engine.errors",
    ),
    "wan.engine.sampling": ("wan.engine.types", "wan.engine.errors"),
    "wan.engine.caching": ("wan.engine.types", "wan.engine.errors", "wan.engine.accounting"),
    "wan.engine.plan": ("wan.engine.options", "wan.engine.hardware", "wan.engine.errors"),
    "wan.engine.compiling": ("wan.engine.plan", "wan.engine.hardware", "wan.engine.errors"),
    "wan.engine.roofline": (),
    "wan.engine.coding": ("wan.engine.roofline",),
    "wan.engine.prediction": ("wan.engine.activations", "wan.engine.coding", "wan.engine.roofline"),
    "wan.engine.budget": ("wan.engine.prediction", "wan.engine.roofline", "wan.engine.errors"),
    "wan.engine.optimizations": ("wan.engine", "wan.resources"),
    "wan.engine": (
        "wan.engine.errors",
        "wan.engine.types",
        "wan.engine.options",
        "wan.engine.hardware",
        "wan.engine.ops",
        "wan.engine.weights",
        "wan.engine.distributed",
        "wan.engine.arena",
        "wan.engine.placement",
        "wan.engine.sampling",
        "wan.engine.plan",
        "wan.engine.accounting",
        "wan.engine.attempts",
        "wan.engine.decoding",
    ),
    "wan.kernels": ("wan.resources",),
    "wan.resources": (),
    "wan.configs": (),
    "wan.modules": ("wan.engine.ops", "wan.engine.types", "wan.engine.errors", "wan.engine.weights"),
    "wan.modules.s2v.audio_encoder": ("wan.conditioning", "wan.engine.errors"),  # upstream's door, which reads files
    "wan.layouts": ("wan.engine.errors", "wan.engine.weights", "wan.modules"),
    "wan.conditioning": ("wan.modules", "wan.video", "wan.engine.types", "wan.engine.errors"),
    "wan.families": (
        "wan.modules",
        "wan.conditioning",
        "wan.configs",
        "wan.engine.types",
        "wan.engine.ops",
        "wan.engine.options",
        "wan.engine.errors",
        "wan.engine.sampling",
    ),
    "wan.prompting": ("wan.conditioning.image", "wan.engine.errors"),
    "wan.utils": ("wan.engine", "wan.conditioning", "wan.modules", "wan.prompting", "wan.video", "wan.resources"),
    "wan.distributed": ("wan.engine", "wan.conditioning", "wan.modules"),
    "wan.video": ("wan.engine", "wan.resources"),
    "wan.runs": ("wan.engine", "wan.video", "wan.resources"),
    "wan.cli": ("wan",),
    "wan": (  # the pipeline and the facades
        "wan.components",
        "wan.layouts",
        "wan.text2video",
        "wan.families",
        "wan.configs",
        "wan.modules",
        "wan.conditioning",
        "wan.engine",
        "wan.pipeline",
        "wan.video",
        "wan.runs",
        "wan.embeddings",
        "wan.resources",
    ),
}

# Packages a layer may import when it is itself imported; every other package only inside the function that uses it.
# wan/__init__.py imports nothing at all: `wan.cli.env` has to act before torch is there.
AT_IMPORT: dict[str, tuple[str, ...]] = {
    "wan.engine.errors": (),
    "wan.resources": (),
    "wan.cli.env": (),
    "wan.configs": ("torch", "easydict"),
    "wan.utils.fm_solvers": ("torch", "diffusers", "numpy"),  # upstream's scheduler classes, derived from diffusers'
    "wan.utils.fm_solvers_unipc": ("torch", "diffusers", "numpy"),
    "wan": ("torch",),
    "kernels": ("torch", "triton"),
}

# wan/configs only sets a default for the tokenizer, as upstream does.
ENVIRONMENT_READERS = {
    "wan/engine/hardware.py",
    "wan/cli/env.py",
    "wan/utils/prompt_extend.py",
    "wan/configs/__init__.py",
}

MAX_LINES = 400
DUPLICATE_RUN = 8

SOURCES = sorted(
    path
    for pattern in ("wan/**/*.py", "kernels/**/*.py", "tools/**/*.py", "*.py")
    for path in ROOT.glob(pattern)
    if "_data" not in path.parts
)
MODULES = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("wan", "kernels")]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_of(name: str, table: dict[str, tuple[str, ...]]) -> str:
    return max((layer for layer in table if within(name, layer)), key=len)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path: Path, *, at_import_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything `path` imports. `from a import b` counts as a.b where that is a module."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]

    def walk(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
        for node in nodes:
            if is_type_checking(node):
                yield from walk(list(node.orelse))  # type: ignore[attr-defined]
            elif isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join(above + ([base] if base else []))
                yield from ((node.lineno, resolve(base, alias.name)) for alias in node.names)
            elif not (at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
                yield from walk(list(ast.iter_child_nodes(node)))

    return walk([ast.parse(path.read_text(encoding="utf-8"))])


def resolve(base: str, name: str) -> str:
    folder = ROOT.joinpath(*base.split("."), name)
    return f"{base}.{name}" if folder.with_suffix(".py").exists() or folder.is_dir() else base


def test_every_layer_imports_only_what_the_table_allows() -> None:
    wrong = []
    for path in MODULES:
        name = module_name(path)
        layer = "wan.kernels" if within(name, "kernels") else layer_of(name, MAY_IMPORT)
        for line, target in imports(path):
            if within(target, "wan") and not any(within(target, p) for p in (layer, name, *MAY_IMPORT[layer])):
                wrong.append(f"{relative(path)}:{line} ({layer}) imports {target}")
            if layer == "wan" and name != "wan" and target == "wan":
                wrong.append(f"{relative(path)}:{line} imports the package itself")
    assert not wrong, "\n".join(wrong)


def test_plug_ins_do_not_know_each_other() -> None:
    wrong = []
    for package, shared in (("wan.engine.optimizations", "wan.engine.optimizations._step_cache"), ("wan.families", "")):
        for path in MODULES:
            name = module_name(path)
            if not name.startswith(package + "."):
                continue
            for line, target in imports(path):
                if target.startswith(package + ".") and target not in (name, shared):
                    wrong.append(f"{relative(path)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_packages_other_than_torch_are_imported_where_they_are_used() -> None:
    wrong = []
    for path in MODULES:
        allowed = AT_IMPORT[layer_of(module_name(path), AT_IMPORT)]
        if module_name(path) == "wan":
            allowed = ()
        for line, target in imports(path, at_import_only=True):
            top = target.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "wan" and top not in allowed:
                wrong.append(f"{relative(path)}:{line} imports {top} at import time")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_command_line() -> None:
    wrong = [
        f"{relative(path)}:{line}"
        for path in MODULES
        if not within(module_name(path), "wan.cli")
        for line, target in imports(path)
        if within(target, "wan.cli")
    ]
    assert not wrong, "\n".join(wrong)


def test_models_know_neither_processes_nor_the_environment() -> None:
    wrong = []
    for path in SOURCES:
        name = relative(path)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            touches = isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv")
            if touches and name not in ENVIRONMENT_READERS and not name.startswith("tools/"):
                wrong.append(f"{name}:{node.lineno} touches the process environment")
        if name.startswith("wan/modules/"):
            wrong += [f"{name}:{n} imports {t}" for n, t in imports(path) if within(t, "torch.distributed")]
    assert not wrong, "\n".join(wrong)


def test_no_file_grows_beyond_what_one_can_read() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def code_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, stripped text) without imports, docstrings, comments, blanks and lone brackets."""
    text = path.read_text(encoding="utf-8")
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if isinstance(node, ast.Import | ast.ImportFrom) or is_text:
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    numbered = ((i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if i not in skipped)
    return [
        (i, line) for i, line in numbered if line and not line.startswith("#") and line not in (")", "]", "}", "),")
    ]


def test_no_code_stands_in_two_files() -> None:
    seen: dict[tuple[str, ...], tuple[str, int]] = {}
    copies = []
    for path in SOURCES:
        lines = code_lines(path)
        for start in range(len(lines) - DUPLICATE_RUN + 1):
            run = tuple(text for _, text in lines[start : start + DUPLICATE_RUN])
            first = seen.setdefault(run, (relative(path), lines[start][0]))
            if first[0] != relative(path):
                copies.append(f"{relative(path)}:{lines[start][0]} repeats {first[0]}:{first[1]}")
    assert not copies, "\n".join(copies)


@pytest.mark.parametrize("folder", ["kernels", "configs", "tests", "tests/engine", "tests/wan", "demo", "tools"])
def test_data_and_test_folders_shadow_no_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter; warnings are errors there."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_wan_loads_nothing_and_prints_nothing() -> None:
    assert python("import sys, wan; assert 'torch' not in sys.modules and 'easydict' not in sys.modules") == ""


OUT_OF_REACH = """
import sys
import torch, easydict

class OnlyThose:
    blocked = (
        "transformers diffusers tokenizers safetensors ftfy imageio_ffmpeg PIL cv2 decord librosa tqdm ray "
        "flash_attn flash_attn_interface sageattention"
    ).split()

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ImportError(name + " is out of reach")

sys.meta_path.insert(0, OnlyThose())
"""


def test_pipeline_and_configs_import_with_torch_and_easydict_alone() -> None:
    """`wan.WanT2V` and `wan.configs` are there although every other installed package is out of reach."""
    imports = (
        "import wan; wan.WanT2V, wan.configs.WAN_CONFIGS, wan.configs.SIZE_CONFIGS\n"
        "import wan.engine.optimizations, wan.modules.model, wan.text2video_optimized\n"
        "assert not torch.cuda.is_initialized()"
    )
    assert python(OUT_OF_REACH + imports) == ""


def test_top_level_kernels_folder_does_not_shadow_the_package_of_that_name() -> None:
    """Without `__init__.py` a namespace folder loses against any installed package `kernels`, wherever it stands."""
    code = (
        "import pathlib, sys, tempfile\n"
        "site = pathlib.Path(tempfile.mkdtemp()); (site / 'kernels').mkdir()\n"
        "(site / 'kernels' / '__init__.py').write_text('installed = True')\n"
        "sys.path.append(str(site))\n"
        "import kernels; assert kernels.installed\n"
        "import wan.kernels; print(any('kernels' in part for part in wan.kernels.__path__))\n"
    )
    assert python(code).strip() == "True"
