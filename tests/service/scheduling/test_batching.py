from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from models.request import ImageRequest
from service.scheduling.batching import Candidate, next_group, shape_of

candidates = st.lists(st.builds(Candidate, st.sampled_from("abc"), st.integers(0, 20)), min_size=1, max_size=12)


@given(candidates)
def test_group_shares_a_step_and_has_who_waited_longest_first(waiting: list[Candidate]) -> None:
    group = [waiting[index] for index in next_group(waiting)]
    assert group[0].last_turn == min(candidate.last_turn for candidate in waiting)
    assert [candidate.last_turn for candidate in group] == sorted(candidate.last_turn for candidate in group)
    assert len(group) == sum(candidate.batch_key == group[0].batch_key for candidate in waiting)


@given(candidates, st.integers(1, 3))
def test_nobody_starves(waiting: list[Candidate], max_batch_size: int) -> None:
    picked = set()
    for turn in range(21, 21 + len(waiting)):
        for index in next_group(waiting)[:max_batch_size]:
            picked.add(index)
            waiting[index] = Candidate(waiting[index].batch_key, turn)
    assert picked == set(range(len(waiting)))


def test_shape_is_model_size_and_guidance(make_request: Callable[..., ImageRequest]) -> None:
    assert shape_of(make_request(seed=1)) == shape_of(make_request(seed=2, prompt="other", num_inference_steps=9))
    for different in ({"width": 128}, {"model": "guided"}, {"true_cfg_scale": 2.0}):
        assert shape_of(make_request(**different)) != shape_of(make_request())
