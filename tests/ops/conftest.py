"""Builds of the compiled form, made once for all tests of this folder; they skip where there is no compiler."""

import pytest

from vqkit.ops.nearest_code import compiled

BUILDS = {"for this processor": (compiled._FLAGS, compiled._FOR_THIS_PROCESSOR), "for any": ((*compiled._FLAGS, "-O1"), ((),))}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder with a build for each of BUILDS."""
    folder = tmp_path_factory.mktemp("compiled")
    try:
        compiled._compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VQKIT_CACHE", str(folder))
        for flags, processors in BUILDS.values():
            patch.setattr(compiled, "_FLAGS", flags)
            patch.setattr(compiled, "_FOR_THIS_PROCESSOR", processors)
            compiled.build_()
        compiled._found.cache_clear()
    return folder


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache of builds."""
    for name in ("VQKIT_COMPILED", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VQKIT_CACHE", str(tmp_path / "cache"))
    compiled._found.cache_clear()
    yield tmp_path / "cache"
    compiled._found.cache_clear()


@pytest.fixture(params=BUILDS)
def build(request, cache, fresh, monkeypatch):
    flags, processors = BUILDS[request.param]
    monkeypatch.setattr(compiled, "_FLAGS", flags)
    monkeypatch.setattr(compiled, "_FOR_THIS_PROCESSOR", processors)
    monkeypatch.setenv("VQKIT_CACHE", str(cache))
    monkeypatch.setenv("CXX", "/no/compiler/is/run")
    assert compiled.is_there()


@pytest.fixture
def native_build(cache, fresh, monkeypatch):
    """What "auto" takes is the compiled form, built for this processor."""
    monkeypatch.setenv("VQKIT_CACHE", str(cache))
    assert compiled.is_there()
