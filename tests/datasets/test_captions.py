"""Caption texts for training: wildcards, lines, tags, prefix and suffix; deterministic in seed, step and index."""

import random
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from paths import CHECKOUT

from scumble.configs.options import Captions, Model, Objective, Options
from scumble.datasets.captions import caption_at_step
from scumble.datasets.reading.folder import read_set
from scumble.datasets.reading.images import Size, center_crop, read_size
from scumble.datasets.wildcards import expand_wildcards
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.latents import encode_set
from scumble.trainer.base_model.load import load
from scumble.trainer.training import objective

DRAWS = 3000


def texts_of(lines: list[str], num_steps: int = DRAWS, **rules: object) -> list[str]:
    table = Captions.model_validate({"caption_dropout": 0.0, **rules})
    return [caption_at_step(lines, table, seed=0, step=step, index=1) for step in range(num_steps)]


def test_without_options_a_caption_is_used_as_written():
    assert set(texts_of(["a cat,  on {a} mat; 1|2"], 20)) == {"a cat,  on {a} mat; 1|2"}


@pytest.mark.parametrize(
    ("text", "alternatives"),
    [
        ("a {red|blue} cat", ["a red cat", "a blue cat"]),
        ("{a|b}{c|d}", ["ac", "ad", "bc", "bd"]),
        ("{big |}cat", ["big cat", "cat"]),
        ("{a|{b|{c|d}}}", ["a", "b", "c", "d"]),
        ("{{a|b}|c}", ["a", "b", "c"]),
        ("{{a|b}}", ["{a|b}"]),
        ("{{a {b|c}}}", ["{a b}", "{a c}"]),
        ("{{{a|b}}}", ["{a}", "{b}"]),
        ("{a}", ["{a}"]),
        ("{a", ["{a"]),
        ("a}b {c|d", ["a}b {c|d"]),
        ("} {a|b} {", ["} a {", "} b {"]),
        ("{x {a|b}}", ["{x a}", "{x b}"]),
        ("{|}", [""]),
        ("a|b", ["a|b"]),
        ("", [""]),
    ],
)
def test_a_wildcard_expands_to_each_of_its_alternatives_and_nothing_else(text: str, alternatives: list[str]):
    draws = [expand_wildcards(text, random.Random(number)) for number in range(400)]
    assert set(draws) == set(alternatives)


def test_the_alternatives_of_a_wildcard_are_equally_likely():
    counts = Counter(texts_of(["{a|b|c|d}"]))
    expected = DRAWS / 4
    chi_square = sum((counts[text] - expected) ** 2 / expected for text in "abcd")
    assert chi_square < 16.27  # three degrees of freedom, p = 0.001


def test_wildcards_can_be_disabled():
    assert set(texts_of(["{a|b}"], 20, wildcards=False)) == {"{a|b}"}


def test_lines_are_picked_with_equal_probability_or_all_joined():
    lines = ["a cat", "zwx cat, sitting", "an animal"]
    assert set(texts_of(lines, 20)) == {"a cat zwx cat, sitting an animal"}
    counts = Counter(texts_of(lines, caption_lines="pick"))
    assert set(counts) == set(lines) and min(counts.values()) > 0.9 * DRAWS / 3
    assert texts_of([], 1, caption_lines="pick", trigger="zwx") == ["zwx"]


def test_the_trigger_is_added_to_the_picked_line_and_once_to_joined_lines():
    lines = ["a cat", "a zwx cat"]
    assert set(texts_of(lines, 50, caption_lines="pick", trigger="zwx")) == {"zwx, a cat", "a zwx cat"}
    assert set(texts_of(["a cat", "a dog"], 5, trigger="zwx")) == {"zwx, a cat a dog"}


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [
        ("a photo of", "", "a photo of zwx, cat"),
        ("masterpiece,", ", on white", "masterpiece, zwx, cat, on white"),
        ("", "at night", "zwx, cat at night"),
        ("zwx style,", "", "zwx style, cat"),
        ("", "by zwx", "cat by zwx"),
    ],
)
def test_prefix_and_suffix_surround_the_caption_and_the_trigger(prefix: str, suffix: str, expected: str):
    assert set(texts_of(["cat"], 5, caption_prefix=prefix, caption_suffix=suffix, trigger="zwx")) == {expected}


def test_prefix_and_suffix_are_never_shuffled_or_dropped():
    rules = {
        "caption_prefix": "p, q,",
        "caption_suffix": ", s",
        "shuffle_tags": True,
        "keep_tags": 0,
        "tag_dropout": 0.5,
    }
    for caption in texts_of(["a, b, c"], 200, **rules):
        assert caption.startswith("p, q,") and caption.endswith(", s")


def test_a_trigger_at_the_end_stays_there_when_tags_are_shuffled():
    draws = set(texts_of(["a, b, c"], 200, trigger="zwx", trigger_position="end", shuffle_tags=True, keep_tags=0))
    assert len(draws) == 6 and all(caption.endswith(", zwx") for caption in draws)
    (framed,) = set(texts_of(["a"], 5, trigger="zwx", trigger_position="end", caption_suffix=", on white"))
    assert framed == "a, zwx, on white"


def test_tags_after_the_kept_ones_are_dropped_independently_with_the_given_probability():
    draws = texts_of(["zwx, a, b, c"], tag_dropout=0.3, keep_tags=1)
    assert all(caption.split(", ")[0] == "zwx" for caption in draws)
    for tag in "abc":
        assert 0.27 < sum(tag not in caption.split(", ") for caption in draws) / DRAWS < 0.33
    both = sum("a" not in caption and "b" not in caption for caption in draws) / DRAWS
    assert 0.07 < both < 0.11  # 0.3 * 0.3: independent of each other
    assert set(texts_of(["zwx, a, b, c"], 5)) == {"zwx, a, b, c"}


def test_a_tag_that_contains_the_trigger_is_never_dropped():
    draws = texts_of(["a, b, ZWX cat"], 300, tag_dropout=0.9, keep_tags=0, trigger="zwx")
    assert all("ZWX cat" in caption for caption in draws)


def test_tags_from_wildcards_are_shuffled_like_others():
    seen = set(texts_of(["k, {a|b}, c"], 400, shuffle_tags=True))
    assert seen == {f"k, {x}, {y}" for one in "ab" for x, y in ((one, "c"), ("c", one))}


def test_caption_dropout_also_drops_prefix_and_trigger():
    draws = texts_of(["cat"], caption_dropout=0.25, caption_prefix="p", trigger="zwx")
    assert set(draws) == {"", "p zwx, cat"}
    assert 0.22 < draws.count("") / DRAWS < 0.28


def test_the_caption_text_depends_only_on_seed_step_and_index():
    rules = Captions(shuffle_tags=True, tag_dropout=0.2, caption_lines="pick", caption_dropout=0.1)
    lines = ["a, b, {c|d}, e", "f, g, h, i"]

    def one(seed: int, step: int, index: int) -> str:
        return caption_at_step(lines, rules, seed=seed, step=step, index=index)

    positions = list(product(range(3), range(3), range(3)))
    first = [one(*position) for position in positions]
    assert first == [one(*position) for position in reversed(positions)][::-1]
    assert len(set(first)) > 12


def test_training_applies_the_caption_rules_without_trigger_for_regularization_images_and_bounds_stored_encodings(
    monkeypatch: pytest.MonkeyPatch,
):
    base = load(Model(), detect_base(Model()), torch.device("cpu"), torch.float32)
    samples = read_set(CHECKOUT / "datasets/samples/clay-style").examples[:2]
    examples = [
        replace(samples[0], lines=("{red|blue} cat", "dog")),
        replace(samples[1], lines=("owl",), is_regularization=True),
    ]
    crops = [[center_crop(read_size(example.image), Size(64, 64))] for example in examples]
    latents = encode_set(base, [(e.image, c) for e, c in zip(examples, crops, strict=True)])
    rules = {"caption_dropout": 0.0, "trigger": "zwx", "caption_prefix": "p", "caption_lines": "pick"}
    data = Options().data.model_copy(update=rules)
    objectives = objective.Objectives(base, examples, crops, latents, data, Objective(), seed=0, text_is_trained=False)
    texts = set()
    monkeypatch.setattr(objective, "MAX_ENCODINGS", 3)
    for number in range(24):
        with torch.no_grad():
            losses = objectives.losses([objective.Sample(0, number, 0), objective.Sample(1, number, 1)])
        assert losses.isfinite().all() and len(objectives.encodings) <= 3
        texts |= set(objectives.encodings)
    assert texts == {"p zwx, red cat", "p zwx, blue cat", "p zwx, dog", "owl"}
