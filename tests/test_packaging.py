"""The package: the contents of the wheel, that it works when installed, the import order, the frozen command line."""

import ast
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from cyclopts import App
from paths import CHECKOUT

from scumble.trainer.cli import app

FOLDERS = ["configs", "datasets", "captioning", "trainer"]
LAYERS = {  # subfolders, lowest first; a layer may import only lower ones; "" is the folder itself
    "datasets": [["reading"], [""], ["checkup"]],
    "trainer": [
        ["system"], ["base_model"], ["adapters"], ["kernels"], ["training"], ["run"], ["previews"], ["plan"],
        ["artifacts", "preflight"], ["commands"], ["train"], ["cli"],
    ],
}  # fmt: skip


def package_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS],
        cwd=CHECKOUT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [Path(line) for line in listed.stdout.splitlines() if (CHECKOUT / line).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, CHECKOUT]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_contains_every_file_of_the_four_folders_and_nothing_else(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"scumble/{path.as_posix()}" for path in package_files()}
    assert "scumble/configs/bases/sketch/unet/diffusion_pytorch_model.safetensors" in names
    assert "scumble/datasets/samples/clay-style/fox.txt" in names


def test_the_wheel_contains_license_and_notice(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_the_wheel_works_in_another_environment_outside_the_checkout(wheel: Path, tmp_path: Path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True
    )

    def run(*arguments: str) -> str:
        done = subprocess.run([*arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    where = run(str(python), "-c", "import scumble.trainer.cli as c; print(c.__file__)").strip()
    assert Path(where).is_relative_to(site)
    scumble = str(tmp_path / "venv/bin/scumble")
    assert "sdxl-style" in run(scumble, "presets")
    run(scumble, "preview", "--prompts", "tiger, flat style", "--num-inference-steps", "2", "--out", "tiger.png")
    assert (tmp_path / "tiger.png").stat().st_size > 1000


def test_import_datasets_never_imports_the_folder_of_scumble(tmp_path: Path):
    assert not (CHECKOUT / "datasets/__init__.py").exists()
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/__init__.py").write_text("who = 'Hugging Face'\n")
    script = f"import sys; sys.path[:0] = [{str(CHECKOUT)!r}, {str(tmp_path)!r}]; import datasets; print(datasets.who)"
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == "Hugging Face\n"


def imports(path: Path) -> set[str]:
    """The modules of scumble that a file imports anywhere, as `folder.module`."""
    package = path.parent.as_posix().replace("/", ".").split(".")
    found = set()
    for node in ast.walk(ast.parse((CHECKOUT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1]
                assert base, f"{path}: a relative import leaves its folder"
                target = base + module
            elif module[:1] == ["scumble"]:
                target = module[1:]
                assert target[:1] != package[:1], f"{path}: use relative imports within a folder"
            else:
                continue
            stems = [".".join([*target, name.name]) for name in node.names]
            found |= {stem if source(stem) else ".".join(target) for stem in stems}
        elif isinstance(node, ast.Import):
            assert not any(name.name.split(".")[0] == "scumble" for name in node.names), f"{path}: use from-imports"
    return found


def source(module: str) -> Path | None:
    path = Path(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if (CHECKOUT / file).is_file()), None)


def modules() -> dict[str, Path]:
    paths = [path for path in package_files() if path.suffix == ".py"]
    return {path.with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path for path in paths}


def test_folders_import_only_lower_folders():
    for name, path in modules().items():
        for target in imports(path):
            upper, lower = FOLDERS.index(name.split(".")[0]), FOLDERS.index(target.split(".")[0])
            assert lower <= upper, f"{path} imports {target}"


def layer_of(module: str) -> int:
    """The index of a module's layer in its folder; 0 if the folder has no layers."""
    folder, *rest = module.split(".")
    layers = LAYERS.get(folder, [])
    found = [index for index, names in enumerate(layers) if rest and rest[0] in names]
    return found[0] if found else next((index for index, names in enumerate(layers) if "" in names), 0)


def test_subfolders_import_only_lower_layers():
    found = {name.split(".")[1] for name in modules() if name.startswith("trainer.")}
    assert found == {name for names in LAYERS["trainer"] for name in names}
    for name, path in modules().items():
        for target in imports(path):
            if name.split(".")[0] == target.split(".")[0] and target != "trainer":
                assert layer_of(target) <= layer_of(name), f"{path} imports {target}"


def test_there_are_no_import_cycles():
    graph = {name: imports(path) - {name} for name, path in modules().items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_module_hides_imports_behind_type_checking():
    assert not [path for path in modules().values() if "TYPE_" + "CHECKING" in (CHECKOUT / path).read_text()]


def commands(group: App, before: str = "") -> Iterator[tuple[str, App]]:
    """Every command with its full name, which begins with those of its groups."""
    for name in sorted(name for name in group if not name.startswith("-")):
        if group[name].default_command is None:
            yield from commands(group[name], f"{before}{name} ")
        else:
            yield before + name, group[name]


def test_the_command_line_has_not_changed():
    lines = [
        f"{name} {flag}"
        for name, command in commands(app)
        for argument in command.assemble_argument_collection()
        for flag in argument.names
        if flag != "*"
    ]
    frozen = (Path(__file__).parent / "command_line.txt").read_text().splitlines()
    assert sorted(set(lines)) == frozen, "the command line changed; if that is intended, update tests/command_line.txt"


@pytest.mark.parametrize(
    "command",
    [["check", "--no-page"], ["caption", "--dry-run"], ["captions", "list"]],
    ids=lambda words: words[0],
)
def test_images_and_captions_are_checked_without_torch(command: list[str], tmp_path: Path):
    script = "import sys; sys.modules['torch'] = None; from scumble.trainer.cli import main; main()"
    samples = CHECKOUT / "datasets/samples/clay-style"
    arguments = [sys.executable, "-c", script, *command, str(samples)]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "20 images" in done.stdout or "20 existing captions kept" in done.stdout
