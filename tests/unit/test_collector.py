import gc

from tailserve.deployments.collector import keep_collector_out_of_steps


def test_a_collection_is_far_off_and_spares_what_lives_already() -> None:
    before = gc.get_threshold()
    try:
        keep_collector_out_of_steps()
        assert gc.get_freeze_count() > 0
        collections = sum(generation["collections"] for generation in gc.get_stats())
        kept = [[n] for n in range(50_000)]
        assert sum(generation["collections"] for generation in gc.get_stats()) == collections
        assert len(kept) == 50_000
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
