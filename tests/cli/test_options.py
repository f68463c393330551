"""Options that stand in several commands: said once, and where a command takes them."""

import inspect
from typing import Any

from umda_fast.cli.options import Bags, Computing, Quiet, TrainedOn, flat


def test_a_group_stands_as_its_options_where_the_command_takes_it() -> None:
    seen: dict[str, Any] = {}

    def command(*, run: str, bags: Bags, top: int = 3, use: TrainedOn, quiet_too: Quiet = False) -> None:
        seen.update(run=run, bags=bags, top=top, use=use, quiet_too=quiet_too)

    taken = flat(command)
    parameters = inspect.signature(taken).parameters
    expected = ["run", "data", "format", "top", "device", "backend", "set_", "skip_bad", "quiet", "quiet_too"]
    assert list(parameters) == expected
    assert [name for name, x in parameters.items() if x.default is inspect.Parameter.empty] == ["run"]

    given = {"data": "digits", "format": None, "device": None, "backend": "cpp", "skip_bad": True, "quiet": False}
    taken(run="r", top=4, quiet_too=True, set_=None, **given)
    assert seen == {
        "run": "r",
        "bags": Bags(data="digits"),
        "top": 4,
        "use": TrainedOn(backend="cpp", skip_bad=True),
        "quiet_too": True,
    }


def test_arguments_of_a_trained_model() -> None:
    assert Computing(device="cpu").arguments() == {"device": "cpu", "backend": "auto"}
    assert TrainedOn(quiet=True).arguments() == {
        "device": "auto",
        "backend": "auto",
        "skip_bad": False,
        "progress": False,
    }
