"""Replacing attributes: of every kind, once, and back again."""

import pytest

from dora_peft.plugin.patching import patch, unpatch, unpatched


def shouting(original):
    return lambda *args: original(*args).upper()


def owner():
    class Owner:
        def method(self):
            """Said by a method."""
            return "method"

        @classmethod
        def of_class(cls):
            return cls.__name__

        @staticmethod
        def static():
            return "static"

    return Owner


CALLS = {
    "method": lambda cls: cls().method(),
    "of_class": lambda cls: cls.of_class(),
    "static": lambda cls: cls.static(),
}


@pytest.mark.parametrize("name", CALLS)
def test_patched_and_given_back(name):
    cls = owner()
    before, original = CALLS[name](cls), cls.__dict__[name]
    patch(cls, name, shouting)
    assert CALLS[name](cls) == before.upper()
    assert type(cls.__dict__[name]) is type(original)
    unpatch(cls, name)
    assert cls.__dict__[name] is original
    assert CALLS[name](cls) == before


@pytest.mark.parametrize("name", CALLS)
def test_patches_do_not_stack(name):
    cls = owner()
    before = CALLS[name](cls)
    patch(cls, name, lambda original: lambda *args: original(*args) + "!")
    patch(cls, name, lambda original: lambda *args: original(*args) + "!")
    assert CALLS[name](cls) == before + "!"
    unpatch(cls, name)
    assert CALLS[name](cls) == before


def test_name_and_documentation_are_the_originals():
    cls = owner()
    patch(cls, "method", shouting)
    assert cls.method.__name__ == "method"
    assert cls.method.__doc__ == "Said by a method."


def test_what_is_not_patched_stays_when_given_back():
    cls = owner()
    original = cls.__dict__["method"]
    unpatch(cls, "method")
    assert cls.__dict__["method"] is original


def test_the_originals_for_as_long_as_it_is_open():
    cls = owner()
    patch(cls, "method", shouting)
    patch(cls, "of_class", shouting)

    def fail():
        with unpatched(cls, "method", "of_class"):
            assert (cls().method(), cls.of_class()) == ("method", "Owner")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert (cls().method(), cls.of_class()) == ("METHOD", "OWNER")
