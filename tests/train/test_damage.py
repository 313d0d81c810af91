"""What the world does to a run: full disks, directories that refuse, damaged checkpoints, data that change, readers beside it."""

import errno
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest

from killed_runs import Launcher, end, half_written
from tiny_runs import differing, tiny_config, traces, write_texts
from vqkit.cli import main
from vqkit.models.weights import find_and_load_weights, newest_whole_checkpoint
from vqkit.train.events import CheckpointSaved, Resumed
from vqkit.train.loop import train


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def config(texts):
    return tiny_config(texts)


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """A finished run; not to be changed."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    train(config, run_dir)
    return run_dir


class Stop(Exception):
    pass


def stopped(config, run_dir, step=15):
    def listen(event):
        if event == CheckpointSaved(step, event.path if isinstance(event, CheckpointSaved) else None):
            raise Stop

    with pytest.raises(Stop):
        train(config, run_dir, on_event=listen)
    return run_dir


@contextmanager
def files_of_at_most(size):
    """The kernel refuses to let any file of this process grow longer, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# TensorBoard's writer fails in its own thread, and tells the loop as well.
in_two_threads = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@in_two_threads
@pytest.mark.parametrize(
    ("size", "name"), [(500, "data"), (9_000, "checkpoints/step_00000003"), (26_000, "checkpoints/step_00000003"), (None, "metrics.jsonl")]
)
def test_a_disk_that_fills_up_is_named_and_costs_nothing(config, unbroken, tmp_path, size, name):
    run_dir = tmp_path / "run"
    if size is None:  # a few more bytes than there are after 21 steps
        size = (stopped(config, run_dir, step=21) / "metrics.jsonl").stat().st_size + 50
    with files_of_at_most(size), pytest.raises(OSError) as error:
        train(config, run_dir)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(run_dir / name))
    assert half_written(run_dir) == []
    train(config, run_dir)
    assert differing(run_dir, unbroken) == []


@in_two_threads
def test_the_command_says_in_one_line_what_is_full_and_where_the_run_stands(config, tmp_path, capsys):
    run_dir = stopped(config, tmp_path / "run", step=21)
    capsys.readouterr()
    with files_of_at_most((run_dir / "metrics.jsonl").stat().st_size + 50):
        assert main(["train", "--run", str(run_dir)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"vqkit: {run_dir / 'metrics.jsonl'}: File too large; ")
    assert said.endswith(f"{run_dir} goes on from step_00000021: vqkit train --run {run_dir}")


def test_a_directory_that_cannot_be_made_or_written_is_named(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"file/run"):
        train(config, tmp_path / "file" / "run")
    run_dir = stopped(config, tmp_path / "run")
    before = traces(run_dir)
    # The super-user may write everywhere, so the refusal is staged where files are made.
    opened = open

    def refuse(path, mode="r", *rest, **options):
        if "r" not in mode and str(run_dir) in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, mode, *rest, **options)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError) as error:
        train(config, run_dir)
    assert error.value.filename == str(run_dir / "config.json")
    assert traces(run_dir) == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])  # more than the last end of line


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_whichever_file_is_damaged_the_checkpoint_before_is_used(config, unbroken, tmp_path, damage):
    run_dir = stopped(config, tmp_path / "run")
    newest, before = run_dir / "checkpoints" / "step_00000015", run_dir / "checkpoints" / "step_00000012"
    files = sorted(path.name for path in newest.iterdir())
    assert len(files) == 6
    for name in files:
        saved = (newest / name).read_bytes()
        damage(newest / name)
        assert newest_whole_checkpoint(run_dir) == before, name
        (newest / name).write_bytes(saved)
        assert newest_whole_checkpoint(run_dir) == newest
    damage(newest / "process_00000.safetensors")
    going_on = resumed(config, run_dir)
    assert (going_on.step, len(going_on.notes)) == (12, 1)
    assert differing(run_dir, unbroken) == []


def test_a_run_notices_that_its_data_changed_and_goes_on_once_they_are_back(config, unbroken, tmp_path):
    texts = shutil.copytree(config.data.path, tmp_path / "texts")
    own = replace(config, data=replace(config.data, path=str(texts)))
    run_dir = stopped(own, tmp_path / "run")
    before, changed = traces(run_dir), texts / "3.txt"
    was = changed.read_text()
    changed.write_text(was.replace("fox", "cat"))
    with pytest.raises(ValueError, match=r"3\.txt changed \(its content has another hash\)"):
        train(own, run_dir)
    assert traces(run_dir) == before
    changed.write_text(was)
    assert resumed(own, run_dir).step == 15
    assert [name for name in differing(run_dir, unbroken) if name != "config.json"] == []


def resumed(config, run_dir):
    events = []
    train(config, run_dir, on_event=events.append)
    return next(event for event in events if isinstance(event, Resumed))


def test_a_flipped_bit_of_any_packed_file_is_named_before_anything_is_trained_on_it(config, unbroken, tmp_path, capsys):
    run_dir = stopped(config, tmp_path / "run")
    before = traces(run_dir)
    files = sorted(path for path in (run_dir / "data").iterdir() if path.stat().st_size)
    assert [path.name for path in files][-4:] == ["train-00000.tokens", "train.offsets", "validation-00000.tokens", "validation.offsets"]
    for file in files:
        saved = file.read_bytes()
        flip(file)
        capsys.readouterr()
        assert main(["train", "--run", str(run_dir)]) == 1, file
        said = capsys.readouterr().err
        assert said.startswith(f"vqkit: {file}") and said.count("\n") == 1, said
        assert file.suffix == ".json" or "is damaged: its content is not what was written; put it back from a copy, or move" in said
        file.write_bytes(saved)
        assert traces(run_dir) == before
    shutil.rmtree(run_dir / "data")  # which is packed anew
    assert resumed(config, run_dir).step == 15
    assert differing(run_dir, unbroken) == []


def test_data_that_are_packed_anew_must_be_those_that_the_run_was_trained_on(config, tmp_path):
    texts = shutil.copytree(config.data.path, tmp_path / "texts")
    own = replace(config, data=replace(config.data, path=str(texts)))
    run_dir = stopped(own, tmp_path / "run")
    (texts / "3.txt").write_text((texts / "3.txt").read_text().replace("fox", "cat"))
    shutil.rmtree(run_dir / "data")
    with pytest.raises(ValueError, match=r"run/data was packed from other data than \S*step_00000015 was trained on \(hash"):
        train(own, run_dir)


def test_the_data_may_be_gone_and_their_packed_form_may_not(config, unbroken, tmp_path):
    texts = shutil.copytree(config.data.path, tmp_path / "texts")
    own = replace(config, data=replace(config.data, path=str(texts)))
    run_dir = stopped(own, tmp_path / "run")
    shutil.rmtree(texts)
    tokens = run_dir / "data" / "train-00000.tokens"
    saved = tokens.read_bytes()
    cut(tokens)
    before = traces(run_dir)
    with pytest.raises(ValueError, match=r"train-00000\.tokens has \d+ bytes.*damaged"):
        train(own, run_dir)
    assert traces(run_dir) == before
    tokens.write_bytes(saved)
    assert resumed(own, run_dir).step == 15
    assert [name for name in differing(run_dir, unbroken) if name != "config.json"] == []


def test_a_reader_beside_a_run_always_finds_a_whole_checkpoint(config, tmp_path):
    """While one is written every step and but one is kept; the run lasts until enough of them were met, however seldom the reader is on."""
    hasty = replace(config, train=replace(config.train, steps=9_999, checkpoint_every=1, keep_checkpoints=1, keep_best=False, eval_every=0))
    (process,) = Launcher().start(hasty, tmp_path / "run")
    seen = set()
    while process.exitcode is None and len(seen) <= 10:
        if newest_whole_checkpoint(tmp_path / "run") is not None or seen:
            folder, model, _ = find_and_load_weights(tmp_path / "run")
            assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
            seen.add(folder.name)
        process.join(0.0)
    process.terminate()
    assert end([process]) == [1]  # it stops, with a checkpoint
    assert len(seen) > 10
