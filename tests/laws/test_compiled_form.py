"""The laws run on what they are asked to run on: the compiled form, where there is a compiler, or plain torch."""

import os
import shutil

from vqkit.ops.nearest_code import compiled


def test_the_compiled_form_is_there_if_asked_for():
    asked = os.environ["VQKIT_COMPILED"] != "0"
    if asked and any(map(shutil.which, ("c++", "g++", "clang++"))):
        assert compiled.is_there(), "install anew: it was compiled of another source, or without a compiler"
    assert asked or not compiled.is_there()
