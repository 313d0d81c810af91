"""Libraries of the compiled form, made once for all tests of this folder; they skip where there is no compiler."""

import pytest

from vqkit.ops.nearest_code import compiled, libraries

LEVELS = {level.name: level for level in libraries.levels() if libraries.is_runnable(level)}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with a library for each of LEVELS, as a wheel brings them."""
    folder = tmp_path_factory.mktemp("made")
    try:
        libraries.find_compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    libraries.make(tuple(LEVELS.values()), folder)
    return folder


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Neither a library that was brought along nor one in the cache, the folder given."""
    for name in ("VQKIT_COMPILED", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(libraries, "FOLDER", tmp_path / "brought")
    monkeypatch.setenv("VQKIT_CACHE", str(tmp_path / "cache"))
    compiled._found.cache_clear()
    yield tmp_path / "cache"
    compiled._found.cache_clear()


@pytest.fixture(params=LEVELS)
def build(request, made, fresh, monkeypatch):
    """Nearest code runs the library of one level."""
    if not libraries.made(LEVELS[request.param], made):
        pytest.skip(f"the compiler does not know {request.param}")
    monkeypatch.setattr(libraries, "FOLDER", made)
    monkeypatch.setattr(libraries, "levels", lambda: (LEVELS[request.param],))
    monkeypatch.setenv("CXX", "/no/compiler/is/run")
    assert compiled.is_there()


@pytest.fixture
def native_build(made, fresh, monkeypatch):
    """What "auto" takes is the compiled form, the best that a wheel brings for this processor."""
    monkeypatch.setattr(libraries, "FOLDER", made)
    assert compiled.is_there()
