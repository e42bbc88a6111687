"The verdict for made-up runs, instruments that fail, and reports of older versions."

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from flowerdiff.evaluation.class_recognition import (
    ClassRecognition,
    ClassResult,
    class_results,
    try_classifier,
)
from flowerdiff.evaluation.instruments import (
    DAMAGES,
    CaptionTest,
    ClassifierTest,
    MetricTest,
    caption_test,
    damaged_sets,
)
from flowerdiff.evaluation.measure import Measurements, distribution_metrics
from flowerdiff.evaluation.metric_table import format_value, previous_metrics
from flowerdiff.evaluation.metrics import Estimate, normalize_for_kid, proportion
from flowerdiff.evaluation.report import headlines
from flowerdiff.evaluation.verdict import Training, decide
from flowerdiff.stages.evaluate import to_json

LONG = Training(steps=2025, planned=2025, samples=64_800, pictures=5400)
SHORT = Training(steps=8, planned=8, samples=256, pictures=225)


def estimate(value):
    return Estimate(value, value - 0.1, value + 0.1, 100)


def measured(score, kid):
    "Measurements with working instruments: a CLIP score between 5 and 60, a KID between 0 and 0.8."
    found = Measurements()
    found.add(
        'clip_score',
        dict(drawn=estimate(score), real=estimate(60), shuffled=estimate(5)),
        CaptionTest(auc=0.99, p_value=0.0005, n=100),
    )
    found.add_compared(
        'kid',
        dict(
            drawn=estimate(kid),
            real=estimate(0),
            noise=estimate(7),
            blurred=estimate(0.8),
            shuffled=estimate(2),
        ),
    )
    return found


def test_a_good_model_is_green_and_a_short_training_is_red_whatever_its_scores():
    assert decide(LONG, measured(56, 0.06), 34.5).light == 'green'
    short = decide(SHORT, measured(56, 0.06), 34.5, 'photos')
    assert short.light == 'red' and 'Not trained enough' in short.headline
    assert '8 of 8 planned steps' in short.lines[0] and '256 pictures' in short.lines[0]
    assert 'train.epochs=285 --continue' in short.lines[1]


def test_a_model_that_draws_confetti_is_red_after_any_training():
    assert decide(LONG, measured(56, 4.2), 34.5).light == 'red'  # no nearer than blurred pictures
    assert decide(LONG, measured(10, 0.06), 34.5).light == 'red'  # its pictures ignore the prompt


def test_green_needs_a_number_that_can_be_trusted():
    nothing = decide(LONG, Measurements(), 34.5)
    assert nothing.light == 'yellow' and 'look at them yourself' in nothing.headline
    assert decide(LONG, measured(56, 0.06), 21.7).light == 'yellow'  # the autoencoder washes pictures out
    stopped = Training(steps=900, planned=2000, samples=64_800, pictures=600)
    assert decide(stopped, measured(56, 0.06), 34.5).light == 'yellow'


def test_the_verdict_names_the_classes():
    names = ['rose', 'lily', 'iris']
    asked = [ClassResult(n, [], [n] * 4 if n != 'iris' else ['rose'] * 4, n != 'iris') for n in names]
    classes = ClassRecognition(asked, ClassifierTest(proportion(40, 45), 1 / 3))
    verdict = decide(LONG, Measurements(classes=classes), 34.5)
    assert verdict.light == 'green'
    assert 'rose, lily.' in ' '.join(verdict.lines) and 'Not recognized yet: iris.' in ' '.join(verdict.lines)


def pictures(n, seed):
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        image = Image.new('RGB', (32, 32), tuple(rng.integers(0, 90, 3).tolist()))
        x, y = rng.integers(2, 16, 2)
        ImageDraw.Draw(image).rectangle([x, y, x + 13, y + 13], tuple(rng.integers(160, 256, 3).tolist()))
        out.append(image)
    return out


def edges(images):
    "Features that see noise, blur and shuffled pixels: how often and how strongly neighbors differ."
    x = np.stack([np.asarray(image, float) / 255 for image in images])
    dx = np.abs(np.diff(x, axis=2)).max(-1)
    return 4 * np.stack([(dx > 0.2).mean((1, 2)), dx.mean((1, 2)), dx.max((1, 2)), x.std((1, 2, 3))], 1)


def collapsed(images):
    "Features that are nearly the same for every image, as of a CLIP that learned nothing."
    rng = np.random.default_rng(int(np.asarray(images[0], int).sum()))
    return normalize_for_kid(np.ones((len(images), 16)) + 1e-3 * rng.normal(size=(len(images), 16)))


@pytest.mark.parametrize('features, works', [(edges, True), (collapsed, False)])
def test_distances_are_shown_only_by_features_that_see_damage(features, works):
    test, real, drawn = (pictures(60, seed) for seed in range(3))
    sets = dict(drawn=drawn, autoencoder=real, real=real, **damaged_sets(real))
    values = distribution_metrics(features(test), {name: features(images) for name, images in sets.items()})
    found = Measurements()
    for name in ('kid', 'precision'):
        found.add_compared(name, values[name], higher_is_better=name == 'precision')
    assert ('kid' in found.metrics) == works
    assert ('KID' in found.skipped) != works
    cards = headlines(found.metrics, 'CLIP 0123', found.skipped)
    assert [c.value for c in cards if c.name == 'KID'] == ([] if works else ['cannot be measured here'])
    if works:
        kid = found.metrics['kid']
        assert kid['real'].high < kid['noise'].low  # the floor is below the ceiling
        assert kid['real'].low <= kid['drawn'].value <= kid['noise'].high
        [card] = [c for c in cards if c.name == 'KID × 1000']
        assert 'real pictures' in card.note and 'noise' in card.note
    else:
        assert 'precision' in found.skipped  # however close to 100 % it is
        assert not {'kid', 'precision'} & set(found.metrics)


def test_a_metric_fails_if_one_kind_of_damage_looks_real():
    for kind in DAMAGES:
        damaged = {k: estimate(5.0) for k in DAMAGES} | {kind: estimate(0.1)}
        assert MetricTest('kid', estimate(0.0), damaged).problem
    assert not MetricTest('kid', estimate(0.0), {k: estimate(5.0) for k in DAMAGES}).problem


def test_a_clip_that_knows_only_most_captions_passes_and_a_guessing_one_does_not():
    rng = np.random.default_rng(5)
    images = rng.normal(size=(60, 16))
    captions = [f'flower {i}' for i in range(60)]
    knows = caption_test(images, images + rng.normal(size=images.shape), captions)
    assert not knows.problem and knows.auc > 0.9
    assert caption_test(images, rng.normal(size=images.shape), captions).problem
    same = caption_test(images, np.ones_like(images), ['a flower'] * 60)
    assert same.problem and same.auc == 0.5


class ByColor:
    "A classifier of red and blue squares."

    def names(self, images):
        return [dict(label='red' if np.asarray(i)[..., 0].mean() > 99 else 'blue') for i in images]


def test_classes_are_counted_on_an_easy_set():
    red = [Image.new('RGB', (8, 8), 'red')] * 6
    blue = [Image.new('RGB', (8, 8), 'blue')] * 6
    classifier = try_classifier(ByColor(), red + blue, ['red'] * 6 + ['blue'] * 6)
    assert (
        classifier.test.accuracy.value == 1 and classifier.test.chance == 0.5 and not classifier.test.problem
    )
    assert classifier.by_class == dict(red=(6, 6), blue=(6, 6))
    names = ['red', 'blue']
    assert class_results(names, dict(red=red, blue=blue), classifier).drawn == names
    # drawing red for every prompt, in part, must not count as knowing red
    mostly_red = class_results(
        ['red', 'blue', 'gray'], dict(red=red[:2], blue=red[:2], gray=red[:2]), classifier
    )
    assert mostly_red.drawn == []
    assert try_classifier(ByColor(), [], []).test.problem
    assert try_classifier(ByColor(), red + red, ['red', 'blue'] * 6).test.problem


def test_metrics_of_an_older_version_still_count(tmp_path):
    from flowerdiff.core.workspace import open_workspace

    ws = open_workspace(tmp_path, 'garden')
    protocol = dict(prompts=200)
    ws.report.mkdir()
    old = dict(model='a' * 64, protocol=protocol, kid=dict(drawn=dict(value=0.02)))
    (ws.report / 'metrics.json').write_text(json.dumps(old))
    assert previous_metrics(ws.report, 'b' * 64, protocol) == old


def test_fid_stands_with_its_number_of_images_and_its_floor():
    "FID of equal distributions is far from 0; its excess over other real images is not."
    test, real, drawn = (pictures(60, seed) for seed in range(3))
    sets = dict(drawn=drawn, autoencoder=real, real=real, **damaged_sets(real))
    values = distribution_metrics(edges(test), {name: edges(images) for name, images in sets.items()})
    found = Measurements()
    found.add_fid(values['fid'], values['fid_excess'])
    fid = found.metrics['fid']
    assert fid['drawn'].low is None and fid['drawn'].n == 60
    assert fid['excess'].low <= 0 <= fid['excess'].high
    [card] = headlines(found.metrics, 'CLIP 0123')
    assert f'from 60 images; real pictures {fid["real"].value:,.1f}' in card.note
    stored = to_json(fid)
    assert set(stored['drawn']) == {'value', 'n'} and set(stored['excess']) == {'value', 'low', 'high', 'n'}
    assert format_value(stored['drawn'], 'fid drawn').endswith('(60 images)')


def test_blind_features_have_no_fid():
    test, real = (pictures(60, seed) for seed in range(2))
    sets = dict(drawn=real, autoencoder=real, real=real, **damaged_sets(real))
    blind = {name: collapsed(images) for name, images in sets.items()}
    values = distribution_metrics(collapsed(test), blind | dict.fromkeys(DAMAGES, blind['real']))
    found = Measurements()
    found.add_fid(values['fid'], values['fid_excess'])
    assert 'fid' not in found.metrics and 'FID' in found.skipped
