from pathlib import Path

import pytest

from tailserve.cluster.config import TailserveConfig, parse_config
from tailserve.deployments.draft_kinds import find_draft, plan_draft
from tailserve.engine.errors import ConfigError
from tailserve.engine.model.eagle import load_eagle
from tailserve.engine.options import LoadOptions

OPTIONS = LoadOptions(path="/models/verifier", num_blocks=10)


def config(**fields: object) -> TailserveConfig:
    return parse_config({"model": "/models/verifier", **fields})


def test_without_a_word_of_it_n_grams_are_the_draft() -> None:
    assert find_draft(config()) is None
    plan = plan_draft(config(), OPTIONS, "/sockets")
    assert plan.draft is not None
    assert plan.draft.kind == "ngram"
    assert not plan.verifier.feature_layers


def test_a_head_gets_the_states_that_it_reads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "tailserve-eagle", "feature_layers": [1, 4, 7]}')
    plan = plan_draft(config(draft_model=str(tmp_path)), OPTIONS, "/sockets")
    assert plan.draft is not None
    assert plan.draft.kind == "eagle"
    assert plan.draft.states_endpoint == plan.verifier.states_endpoint == "ipc:///sockets/states"
    assert plan.verifier.feature_layers == (1, 4, 7)
    assert plan.num_outcomes == 0


def test_the_demo_models_own_draft_ships() -> None:
    folder = find_draft(config(model=None, draft_model="demo"))
    assert folder is not None
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 20_000_000
    load_eagle(folder).check_fits(hidden_size=576, vocab_size=49152, num_layers=30)


def test_no_other_model_gets_it() -> None:
    with pytest.raises(ConfigError, match="tailserve distill"):
        find_draft(config(draft_model="demo"))


def test_a_model_is_loaded_with_blocks_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    plan = plan_draft(config(draft_model=str(tmp_path), draft_noise=0.5, pre_speculation=5), OPTIONS, "/sockets")
    assert plan.draft is not None
    assert plan.draft.kind == "model"
    assert plan.draft.load is not None
    assert (plan.draft.load.path, plan.draft.load.num_blocks, plan.draft.load.noise) == (str(tmp_path), None, 0.5)
    assert plan.num_outcomes == 5


@pytest.mark.parametrize("fields", [{"draft_model": "none"}, {"speculation": "off"}])
def test_without_speculation_there_is_no_draft(fields: dict[str, object]) -> None:
    assert plan_draft(config(**fields), OPTIONS, "/sockets").draft is None


def test_a_draft_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_draft(config(draft_model=str(tmp_path)))


def test_a_draft_is_in_one_piece_whatever_the_verifier_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    options = LoadOptions(path="/models/verifier", num_blocks=10, tensor_parallel_size=2)
    plan = plan_draft(config(draft_model=str(tmp_path), tensor_parallel_size=2), options, "/sockets")
    assert plan.verifier.load.tensor_parallel_size == 2
    assert plan.draft is not None
    assert plan.draft.load is not None
    assert plan.draft.load.tensor_parallel_size == 1
