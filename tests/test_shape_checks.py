"""The tests' shape checks find a wrong annotation no matter which tests ran before in the process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float
from torch import Tensor

checked = jaxtyping.jaxtyped(typechecker=beartype)  # as conftest.py has it


def test_a_call_of_a_new_form_is_checked_after_thousands_of_another() -> None:
    @checked
    def turned(x: Float[Tensor, "n c"], *, turn: bool) -> Float[Tensor, "n c"]:
        return x.mT if turn else x

    for _ in range(2000):
        turned(torch.ones(3, 3), turn=True)  # this shape does not contradict the annotation
        turned(torch.ones(2, 3), turn=False)
    with pytest.raises(jaxtyping.TypeCheckError, match=r"return value of .*turned"):
        turned(torch.ones(2, 3), turn=True)
    with pytest.raises(jaxtyping.TypeCheckError, match=r"parameters of .*turned"):
        turned(torch.ones(3, 3, dtype=torch.int64), turn=True)


def test_a_result_of_a_new_form_is_checked_where_its_arguments_are_of_an_old_one() -> None:
    length = 3

    @checked
    def grown(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return x.new_ones(length)

    for _ in range(2000):
        grown(torch.ones(3))
    length = 4
    with pytest.raises(jaxtyping.TypeCheckError, match=r"return value of .*grown"):
        grown(torch.ones(3))


def test_functions_within_a_function_share_what_was_seen_and_are_checked_too() -> None:
    def make(rows: int) -> object:
        @checked
        def widened(x: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
            return torch.cat([x] * rows)

        return widened

    for _ in range(500):
        make(1)(torch.ones(2, 3))
    with pytest.raises(jaxtyping.TypeCheckError, match=r"return value of .*widened"):
        make(2)(torch.ones(2, 3))


def test_generators_are_checked_when_they_are_made_and_within_a_function_too() -> None:
    def make() -> Callable[..., Iterator[int]]:
        @checked
        def rows(x: Float[Tensor, "n c"], y: Float[Tensor, " n"]) -> Iterator[int]:
            yield len(x)

        return rows

    for _ in range(500):
        assert list(make()(torch.ones(2, 3), torch.ones(2))) == [2]
    with pytest.raises(jaxtyping.TypeCheckError, match=r"parameters of .*rows"):
        make()(torch.ones(2, 3), torch.ones(3))


def test_fields_of_a_dataclass_are_checked_whenever_their_form_is_new() -> None:
    @checked
    @dataclass(frozen=True)
    class Pair:
        x: Float[Tensor, "n c"]
        y: Float[Tensor, " n"]

    for _ in range(500):
        Pair(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(jaxtyping.TypeCheckError, match="Pair"):
        Pair(torch.ones(2, 3), torch.ones(3))


def test_arguments_may_have_any_name_with_defaults_of_any_kind() -> None:
    @dataclass(frozen=True)
    class Held:
        given: Float[Tensor, " n"]
        _made: list[int] = field(default_factory=list)

    @checked
    def run(
        _made: int, _seen: int, _new: Float[Tensor, " n"], /, *_result: int, _key: int = 0, **_defaults: int
    ) -> int:
        return _made + _seen + len(_new) + sum(_result) + _key + sum(_defaults.values())

    for _ in range(3):
        assert checked(Held)(torch.ones(2))._made == []
        assert run(1, 2, torch.ones(3), 4, 5, _key=6, _again=7, sampled=8) == 36
    with pytest.raises(jaxtyping.TypeCheckError, match=r"parameters of .*run"):
        run(1, 2, torch.ones(3, 3), 4)
