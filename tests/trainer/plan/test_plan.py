"""The plan: how often previews and checkpoints come, learning rates by algorithm and optimizer, settled options."""

import pytest

from scumble.configs.options import Options
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.plan.plan import Plan, interval, make_plan, settled


def plan_of(num_images: int = 20, **tables: object) -> Plan:
    options = Options.model_validate(tables)
    return make_plan(options, detect_base(options.model), -(-num_images // 4), num_images, num_images)


@pytest.mark.parametrize(
    ("asked", "num_epochs", "expected"),
    [("auto", 1, 1), ("auto", 16, 1), ("auto", 17, 2), ("auto", 32, 4), ("auto", 100, 10), ("auto", 97, 9),
     ("epoch", 100, 1), (0, 100, 0), (7, 100, 7)],
)  # fmt: skip
def test_auto_is_every_epoch_up_to_16_and_then_about_12_times(asked: int | str, num_epochs: int, expected: int):
    steps_per_epoch = 5
    found = interval(asked, num_epochs, steps_per_epoch)
    assert found == (expected if isinstance(asked, int) else expected * steps_per_epoch)
    if asked == "auto":
        assert num_epochs <= 16 or 6 <= num_epochs * steps_per_epoch // found <= 12


def test_previews_and_checkpoints_are_planned_apart():
    plan = plan_of(optimization={"epochs": 40}, output={"preview_every": "epoch", "save_every": 0})
    assert (plan.preview_every, plan.save_every, plan.num_steps) == (5, 0, 200)


def test_settled_options_have_no_auto_left_that_the_plan_decides():
    options = Options()
    plan = plan_of()
    found = settled(options, plan, "name")
    assert found.optimization.steps == plan.num_steps and found.optimization.epochs == "auto"
    assert found.optimization.learning_rate == plan.learning_rates["unet"]
    assert found.output.output_name == "name" and found.output.preview_every == plan.preview_every
    again = make_plan(found, detect_base(found.model), 5, 20, 20)
    assert (again.num_steps, again.learning_rates, again.parts) == (plan.num_steps, plan.learning_rates, plan.parts)


def test_a_rate_that_is_asked_for_is_taken_and_the_second_text_encoder_follows_the_first():
    rates = plan_of(optimization={"learning_rate": 3e-4, "text_encoder_lr": 2e-5}).learning_rates
    assert rates == {"unet": 3e-4, "text": 2e-5, "text2": 2e-5}
    assert plan_of(network={"algorithm": "lokr"}).learning_rates["unet"] == pytest.approx(8 * 2e-3)
