from service.scheduling.queueing import due_at


def test_light_jobs_overtake_heavy_ones_that_came_a_bounded_time_before() -> None:
    heavy = due_at(100.0, 10.0)
    assert due_at(150.0, 1.0) < heavy < due_at(100.0 + 20 * 9.5, 1.0)


def test_work_of_the_same_key_counts_over_its_weight_and_with_the_number_of_keys() -> None:
    alone, busy = due_at(0.0, 1.0), due_at(0.0, 1.0, own_s=30.0, num_keys=2)
    assert alone < due_at(0.0, 1.0, own_s=30.0, weight=2.0, num_keys=2) < busy
    assert due_at(0.0, 1.0, own_s=30.0, weight=2.0, num_keys=4) == busy


def test_nobody_comes_before_a_deadline_once_half_of_its_time_is_over() -> None:
    assert due_at(100.0, 50.0, deadline_at=120.0) == 110.0
    assert due_at(100.0, 0.1, deadline_at=120.0) == due_at(100.0, 0.1)
