"""Is the pipeline or the model the limit: the verdict, and the config that is measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tiny_runs import CPU

from trainer import recipes
from trainer.headspace import Headspace, one_rank_config


def found(**changed: Any) -> Headspace:
    return dataclasses.replace(
        Headspace(
            device="cuda:0",
            num_rounds=5,
            num_steps=10,
            images_per_step=64,
            model_images_per_s=1000.0,
            loader_images_per_s=3100.0,
            together_images_per_s=990.0,
            fetch_wait_share=0.0,
            decode_wait_share=0.01,
            copy_share=0.01,
            model_share=0.98,
            bytes_per_image=110_000.0,
        ),
        **changed,
    )


def test_a_loader_with_much_to_spare_leaves_the_model_as_the_limit() -> None:
    assert found().limit == "model"
    assert found().verdict() == "the model is the limit: the pipeline could feed 3.1 x as much"
    assert found().store_bytes_per_s == 341e6


def test_a_slow_loader_is_the_limit_and_the_advice_is_for_what_was_waited_for() -> None:
    slow = {"loader_images_per_s": 500.0, "together_images_per_s": 480.0, "model_share": 0.49}
    decode = found(**slow, fetch_wait_share=0.1, decode_wait_share=0.4)
    fetch = found(**slow, fetch_wait_share=0.4, decode_wait_share=0.1)
    assert decode.limit == fetch.limit == "pipeline"
    assert "the pipeline is the limit: the model runs at 48% of its speed" in decode.verdict()
    assert "data.num_decode_threads" in decode.verdict()
    assert "data.decode_device to mixed" in decode.verdict()
    assert "mixed" not in dataclasses.replace(decode, device="cpu").verdict()
    assert "data.num_fetches" in fetch.verdict()


def test_a_model_that_waits_is_limited_by_the_pipeline_even_if_the_loader_alone_is_faster() -> None:
    assert found(together_images_per_s=700.0, decode_wait_share=0.3, model_share=0.68).limit == "pipeline"


def test_a_model_that_is_slowed_without_waiting_shares_the_cpus() -> None:
    shared = found(together_images_per_s=800.0, decode_wait_share=0.0)
    assert shared.limit == "cpus"
    assert shared.verdict().startswith("the CPUs are the limit: the model runs at 80%")


@pytest.mark.parametrize("recipe", recipes.names())
def test_every_recipe_can_be_measured_as_one_rank_on_a_cpu(recipe: str) -> None:
    config = recipes.get(recipe)
    measured = one_rank_config(config, CPU, None)
    assert measured.data.decode_device == "cpu"
    assert 1 <= measured.data.global_batch_size <= config.data.global_batch_size
    assert measured.model == config.model
    assert measured.data.augment == config.data.augment
    assert one_rank_config(config, CPU, 6).data.global_batch_size == 6


def test_a_micro_batch_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"micro_batch_size \(0\) must be at least 1"):
        one_rank_config(recipes.get("demo"), CPU, 0)
