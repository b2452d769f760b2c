"""Options: one declaration defines flag, TOML key, help and reference; layers have an order; errors are one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import CHECKOUT

from scumble.configs import files
from scumble.configs.errors import Refused
from scumble.configs.options import Options, declared
from scumble.configs.reference import reference
from scumble.trainer import cli


def toml(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str) -> str:
    with pytest.raises(Refused) as error:
        files.resolve(toml(folder, text))
    line = str(error.value)
    assert "\n" not in line
    return line.replace(str(folder / "mine.toml"), "mine.toml")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of one command in this process."""
    code = 0
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_flags_override_the_file_the_file_overrides_the_preset_and_the_preset_overrides_the_defaults(tmp_path: Path):
    path = toml(
        tmp_path,
        'preset = "sdxl-character"\n[network]\nalpha = 4\n[optimization]\nlearning_rate = 1e-3\nbatch_size = 2\n',
    )
    options = files.resolve(path, flags={"optimization": {"learning_rate": 5e-5}})
    assert options.optimization.learning_rate == 5e-5  # flag over file
    assert options.network.alpha == 4 and options.optimization.batch_size == 2  # file over default
    assert options.network.rank == 32 and options.data.kind == "character"  # preset
    assert options.objective == Options().objective  # defaults


def test_a_preset_flag_overrides_the_preset_named_in_the_file(tmp_path: Path):
    path = toml(tmp_path, 'preset = "sdxl-character"\n')
    assert files.resolve(path, preset="sd15-style").data.resolution == 512


def test_a_default_value_in_a_file_overrides_its_preset(tmp_path: Path):
    path = toml(tmp_path, 'preset = "sdxl-character"\n[network]\nrank = "auto"\n')
    assert files.resolve(path).network.rank == "auto"


@pytest.mark.parametrize("name", files.presets())
def test_every_preset_is_valid_and_states_its_purpose(name: str):
    assert files.resolve(preset=name) != Options()
    assert len(files.presets()[name]) > 10


def test_written_options_are_read_back_unchanged(tmp_path: Path):
    options = files.resolve(
        flags={
            "data": {"trigger": 'a "quoted" wörd', "images": "C:\\images"},
            "previews": {"prompts": ("a, b", "c")},
            "optimization": {"learning_rate": 3e-05},
        }
    )
    assert files.resolve(toml(tmp_path, files.dumps(options))) == options


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[network]\nrnk = 4",
            "mine.toml: network.rnk = 4: no such option in [network] (did you mean rank?); "
            "`scumble options` lists all options",
        ),
        (
            "[network]\nlearning_rate = 1e-4",
            "mine.toml: network.learning_rate = 0.0001: no such option in [network] (move it to [optimization]); "
            "`scumble options` lists all options",
        ),
        ("[network]\nrank = 0", "mine.toml: network.rank = 0: must be a whole number from 1 to 1024, or auto"),
        ("[network]\nrank = 4.5", "mine.toml: network.rank = 4.5: must be a whole number from 1 to 1024, or auto"),
        ('[network]\nrank = "16"', 'mine.toml: network.rank = "16": must be a whole number from 1 to 1024, or auto'),
        ("[network]\nrank = true", "mine.toml: network.rank = true: must be a whole number from 1 to 1024, or auto"),
        ("[network]\nrslora = 1", "mine.toml: network.rslora = 1: must be true | false"),
        ("[data]\ntrigger = 7", "mine.toml: data.trigger = 7: must be text"),
        (
            "[optimization]\nlearning_rate = nan",
            "mine.toml: optimization.learning_rate = nan: must be a number above 0 to 100, or auto",
        ),
        (
            "[optimization]\nlearning_rate = inf",
            "mine.toml: optimization.learning_rate = inf: must be a number above 0 to 100, or auto",
        ),
        ("[network]\nlora_dropout = 1", "mine.toml: network.lora_dropout = 1: must be a number from 0 to below 1"),
        ('[previews]\nprompts = "a"', 'mine.toml: previews.prompts = "a": must be a list of texts'),
        (
            '[optimization]\nlr_scheduler = "cos"',
            'mine.toml: optimization.lr_scheduler = "cos": '
            "must be auto | constant | constant_with_warmup | cosine | cosine_with_restarts | linear | rex",
        ),
        ("network = 4", "mine.toml: network = 4: [network] is a table of options, not a value"),
        ("preset = 4", "mine.toml: preset = 4: must be text; `scumble presets` lists the presets"),
    ],
)
def test_an_invalid_file_is_refused_in_one_line_with_file_key_value_and_fix(tmp_path: Path, text: str, line: str):
    assert refused(tmp_path, text) == line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rank = 4", ["rank = 4", "move it to [network]"]),
        ("[netwrk]\nrank = 4", ["netwrk", "did you mean network?"]),
        ('preset = "sd15-stile"', ["preset = sd15-stile", "did you mean sd15-style?"]),
        ("[network\n", ["mine.toml: is not TOML", "line 1"]),
    ],
)
def test_an_unknown_name_is_reported_with_the_closest_known_name(tmp_path: Path, text: str, parts: list[str]):
    line = refused(tmp_path, text)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--train_batch_size", "scumble: --train_batch_size: use --batch-size (total over all devices)"),
        ("--cache-latents", "scumble: --cache-latents: latents are always cached; --latent-cache sets the folder"),
    ],
)
def test_a_flag_of_another_trainer_is_answered_with_our_flag_or_a_reason(
    capsys: pytest.CaptureFixture[str], flag: str, line: str
):
    code, _, errors = run(capsys, "train", "photos", flag, "2")
    assert (code, errors.strip()) == (2, line)


def test_a_missing_flag_is_named(capsys: pytest.CaptureFixture[str]):
    code, _, errors = run(capsys, "adapter", "verify", "x.safetensors")
    assert (code, errors.strip()) == (2, "scumble: adapter verify: --base is required; see --help")


def test_a_flag_of_another_trainer_is_recognized_with_its_value_behind_an_equals_sign(
    capsys: pytest.CaptureFixture[str],
):
    code, _, errors = run(capsys, "train", "--train_batch_size=2", "photos")
    assert code == 2 and errors.startswith("scumble: --train_batch_size: use --batch-size")


@pytest.mark.parametrize("text", ["[optimization]\ntrain_batch_size = 2", "train_batch_size = 2"])
def test_a_key_of_another_trainer_in_a_file_is_answered_with_our_flag(tmp_path: Path, text: str):
    assert refused(tmp_path, text).endswith("train_batch_size = 2: use --batch-size (total over all devices)")


def test_a_missing_or_non_utf8_file_is_reported(tmp_path: Path):
    path = tmp_path / "latin.toml"
    path.write_bytes('[data]\ntrigger = "Bäume"\n'.encode("latin-1"))
    with pytest.raises(Refused, match=r"latin\.toml: is not UTF-8"):
        files.resolve(path)
    with pytest.raises(Refused, match=r"none\.toml: no such file"):
        files.resolve(tmp_path / "none.toml")


def test_a_byte_order_mark_is_ignored(tmp_path: Path):
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbf[network]\nrank = 4\n")
    assert files.resolve(path).network.rank == 4


def test_no_two_options_share_a_flag_and_each_has_help():
    flags = [entry.flag for entry in declared()]
    assert len(flags) == len(set(flags))
    assert all(len(entry.help) >= 5 and not entry.help.endswith(".") for entry in declared())


def test_every_option_is_in_the_help_and_in_the_reference():
    command = [sys.executable, "-m", "scumble.trainer.cli", "train", "--help"]
    wide = os.environ | {"COLUMNS": "120"}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=wide).stdout
    for entry in declared():
        assert f"{entry.flag} " in text, entry.flag
        assert f"| `{entry.key}` | `{entry.flag}` |" in reference()


def test_the_reference_in_the_repository_equals_the_output_of_the_command(capsys: pytest.CaptureFixture[str]):
    code, text, _ = run(capsys, "options")
    assert code == 0
    assert (CHECKOUT / "configs/OPTIONS.md").read_text(encoding="utf-8") == text


def test_flags_reach_the_plan(capsys: pytest.CaptureFixture[str]):
    samples = str(CHECKOUT / "datasets/samples/clay-style")
    code, text, _ = run(
        capsys, "train", samples, "--preset", "low-memory", "--rank", "7", "--learning-rate", "3e-5", "--epochs", "2",
        "--prompts", "a", "--prompts", "b --n c", "--json", "--dry-run",
    )  # fmt: skip
    plan = json.loads(text.partition("\n")[0])
    assert code == 0 and plan["preview_prompts"] == 2
    assert "LoRA on UNet (attention) rank 7" in plan["reasons"]  # the preset does not train the text encoders
    assert plan["steps"] == 2 * 20 / 4 and "adamw, cosine, learning rate 3e-05 (unet)" in plan["reasons"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--rank", "0"], "scumble: --rank 0: must be a whole number from 1 to 1024, or auto"),
        (["--rank", "x"], "scumble: --rank x: must be a whole number from 1 to 1024, or auto"),
        (["--text-encoder-2-lr", "-1"], "scumble: --text-encoder-2-lr -1: must be a number above 0 to 100, or auto"),
        (["--device", "gpu"], "scumble: --device gpu: must be auto | cuda | cpu | mps"),
        (
            ["--rnk", "4"],
            "scumble: --rnk: no such option of this command (did you mean --rank?); "
            "see --help, or `scumble options` for all of them",
        ),
        (
            ["--preset", "sdxl"],
            "scumble: --preset sdxl: no such preset; the presets are low-memory, sd15-character, sd15-style, "
            "sdxl-character, sdxl-style, sketch-demo",
        ),
        (["more"], "scumble: more: unexpected argument; see --help"),
    ],
)
def test_an_invalid_flag_is_refused_in_one_line_with_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
):
    code, out, err = run(capsys, "train", "photos", "--dry-run", *arguments)
    assert (code, out, err) == (2, "", line + "\n")


def test_presets_are_listed_with_their_purpose(capsys: pytest.CaptureFixture[str]):
    code, text, _ = run(capsys, "presets")
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()] == list(files.presets())


def test_help_imports_nothing_slow():
    script = (
        "import sys\nfrom scumble.trainer import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'PIL', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def run_process(body: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    """Run `scumble` in a process, with `body` as its command and buffered output."""
    script = (
        "import atexit, sys, threading, time\nfrom scumble.trainer import cli\n"
        "class PrintsOnDelete:\n    def __del__(self): print('destroyed')\n"
        f"instance = PrintsOnDelete()\ndef main():\n    {body}\ncli.main = main\ncli.process()"
    )
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", script], text=True, env=environment, **streams)


@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("sys.exit(None)", 0), ("sys.exit(65)", 65), ("sys.exit('no')", 1), ("1 / 0", 1)]
)
def test_a_process_exits_with_its_code_after_writing_all_output(end: str, code: int):
    done = run_process(
        "atexit.register(print, 'at the end');"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start();"
        f"print('x' * 100_000); {end}"
    )
    assert done.returncode == code
    assert done.stdout.split() == ["x" * 100_000, "late", "at", "the", "end"]  # and no object was destroyed
    errors = {"sys.exit('no')": ["no"], "1 / 0": ["ZeroDivisionError: division by zero"]}
    assert done.stderr.splitlines()[-1:] == errors.get(end, [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_lost_output_is_reported():
    with Path("/dev/full").open("w") as full:
        done = run_process("print('x')", stdout=full)
    assert done.returncode == 120 and "the output is incomplete" in done.stderr


@pytest.mark.parametrize(
    "body", ["sys.stdout.close()", "import os; os.close(0); print('x' * 10); read, write = os.pipe(); os.close(read); "
    "os.dup2(write, 1)"]
)  # fmt: skip
def test_a_closed_output_is_not_an_error(body: str):
    done = run_process(body)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_without_output_streams_exits_normally():
    done = run_process("sys.stdout = sys.stderr = None; sys.exit(65)")
    assert (done.returncode, done.stdout, done.stderr) == (65, "", "")
