"A student with one fault, compared with its teacher."

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from flowerdiff.evaluation.metrics import Estimate
from flowerdiff.evaluation.student_eval import (
    ImageStats,
    Reference,
    compare_to_teacher,
    image_properties,
    thumbnails,
)

N = 48


def features(pictures):
    "The images in 8 by 8 pixels, in place of a network."
    return np.stack([np.asarray(p.resize((8, 8)), float).ravel() for p in pictures])


def draw(seed, n=N):
    "Images with fine structure, a color and a gradient each."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64] / 64
    found = []
    for _ in range(n):
        a, b = rng.normal(size=(2, 3))
        smooth = 120 + 40 * a * x[..., None] + 40 * b * y[..., None]
        stripes = 25 * np.sin(2 * np.pi * (rng.integers(6, 12) * x + rng.integers(6, 12) * y))
        found.append(Image.fromarray((smooth + stripes[..., None]).clip(0, 255).astype(np.uint8)))
    return found


def stats(pictures, clip_score=None):
    scores = [] if clip_score is None else [clip_score] * len(pictures)
    correct = [True] * len(pictures) if clip_score is None else []  # adherence sees none of the faults
    return ImageStats(image_properties(pictures), features(pictures), thumbnails(pictures), correct, scores)


TEACHER = draw(0)
TRAIN = draw(1, 100)
REFERENCE = Reference(features(draw(2)), thumbnails(TRAIN))


def cast(picture):
    red, green, blue = picture.split()
    return Image.merge('RGB', (red.point(lambda v: min(255, v + 18)), green, blue))


FAULTS = dict(
    detail=[p.filter(ImageFilter.GaussianBlur(1.5)) for p in TEACHER],
    contrast=[ImageEnhance.Contrast(p).enhance(0.6) for p in TEACHER],
    color=[cast(p) for p in TEACHER],
    repeats=[TEACHER[i % 8] for i in range(N)],
    copies=[ImageOps.mirror(p) for p in TRAIN[:N]],
)


@pytest.mark.parametrize('fault', FAULTS)
def test_a_student_with_a_fault_that_adherence_does_not_see_fails(fault):
    result = compare_to_teacher(stats(FAULTS[fault]), stats(TEACHER), REFERENCE)
    assert not result.passed
    assert result.numbers['lost'] == 0.0
    assert fault in result.reason.partition(':')[0]


def test_an_identical_student_passes():
    result = compare_to_teacher(stats(TEACHER), stats(TEACHER), REFERENCE)
    assert result.passed
    assert 'fails' not in result.reason


def test_a_clip_score_is_lost_as_a_share_of_what_captions_change():
    "As a share of the score itself, 25 to 24 would be 4 %, and pass."
    reference = replace(REFERENCE, clip_gap=Estimate(6.0, 5.0, 7.0))
    result = compare_to_teacher(stats(TEACHER, 24.0), stats(TEACHER, 25.0), reference)
    assert not result.passed
    assert result.numbers['lost'] == pytest.approx(1 / 6)
    blind = replace(REFERENCE, clip_gap=Estimate(0.1, -0.4, 0.6))
    unmeasured = compare_to_teacher(stats(TEACHER, 25.0), stats(TEACHER, 25.0), blind)
    assert 'does not tell right captions' in unmeasured.reason
