"""The mixed garden: captions that are true and stay the same, and networks whose training survives a kill.

A sentence is read back with the tables of words alone: what it says must be in the attributes.
"""

import hashlib
import importlib.util
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from flowerdiff.core.profiles import load_profile
from flowerdiff.core.workspace import read_jsonl, read_workspace
from flowerdiff.garden import garden, words
from flowerdiff.garden.captions import caption, changed_captions, garden_caption
from flowerdiff.garden.flower_shapes import COLORS as GARDEN_COLORS
from flowerdiff.garden.misspelling import misspell, misspelled
from flowerdiff.garden.mixed_garden import CLASSIFIED, NONE, flowers, kinds_of, sample_attributes
from flowerdiff.garden.worlds import WORLDS, place_combinations

LEAST_PSNR = 33.0  # dB, of the bundled autoencoder
BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'
PLACES = {
    word: place
    for table in (words.PLACE_PHRASES, words.PLACE_TAGS)
    for place, row in table.items()
    for word in row
}
COLORS = {word: color for color, row in words.COLOR_WORDS.items() for word in row}
SPECIES = {word: name for name, rows in words.SPECIES_WORDS.items() for row in rows for word in row}
SIZES = {word: size for size, row in words.SIZE_WORDS.items() for word in row}
DENIABLE = '|'.join(sorted(set(COLORS) | set(SPECIES), key=len, reverse=True))
NAME = rf'(?:an? )?({DENIABLE})(?: or ({DENIABLE}))?(?![\w-])'


def denial(template):
    "Return the regular expression of a template of denials, without the noun."
    text = next(part for part in template.split('{noun}') if '{color}' in part or '{other}' in part)
    return (
        re.escape(text.strip(' .'))
        .replace(r'\{be\}', '(?:is|are)')
        .replace(r'\{color\}', NAME)
        .replace(r'\{other\}', NAME)
    )


def pattern(table):
    "Match any word of a table, the longest first."
    longest_first = sorted(table, key=len, reverse=True)
    return re.compile(rf'(?<![\w-])({"|".join(map(re.escape, longest_first))})(?![\w-])')


TEMPLATES = set(map(denial, (*words.NOT_COLOR, *words.NOT_SPECIES, *words.ONLY_NOT_SPECIES)))
DENIED = re.compile('|'.join(sorted(TEMPLATES, key=len, reverse=True)))
ABSENT = pattern(words.ABSENCES)
COMPOUND = pattern(word for word in COLORS if not word.isalpha())
LEAVES = pattern(
    phrase.format(have=have)
    for row in words.LEAF_WORDS.values()
    for phrase in row
    for have in ('has', 'have')
)
PATTERNS = {
    name: pattern(table)
    for name, table in dict(places=PLACES, species=SPECIES, colors=COLORS, sizes=SIZES).items()
}


def read(text):
    "Read a caption back: what it says and what it denies."
    text = text.lower()
    found = dict(absent=ABSENT.findall(text))
    text = ABSENT.sub(' _ ', text)
    text = LEAVES.sub(' _ ', text)
    found['denied'] = [word for match in DENIED.finditer(text) for word in match.groups() if word]
    text = DENIED.sub(' _ ', text)
    found['colors'] = [COLORS[word] for word in COMPOUND.findall(text)]  # 'ocean blue' is no beach
    text = COMPOUND.sub(' _ ', text)
    for name, table in dict(places=PLACES, species=SPECIES, colors=COLORS, sizes=SIZES).items():
        found[name] = found.get(name, []) + [table[word] for word in PATTERNS[name].findall(text)]
        text = PATTERNS[name].sub(' _ ', text)
    return found


def captioned(n=3000):
    for i in range(n):
        attributes = sample_attributes(4, i)
        yield attributes, *caption(attributes, random.Random(i))


def test_every_word_of_a_caption_is_true():
    said = Counter()
    for attributes, text, _ in captioned():
        found = read(text)
        kinds = kinds_of(attributes)
        said.update({name: bool(values) for name, values in found.items()})
        assert set(found['species']) <= {kind[0] for kind in kinds}, text
        assert set(found['colors']) <= {kind[1] for kind in kinds}, text
        assert set(found['places']) <= {attributes['place']}, text
        assert set(found['sizes']) <= {attributes['size']}, text
        for phrase in found['absent']:
            assert attributes['place'] not in words.ABSENCES[phrase], text
        for word in found['denied']:
            assert COLORS.get(word) != kinds[0][1] and SPECIES.get(word) != kinds[0][0], text
    assert min(said.values()) > 60, said  # each of them is said, and read back


def test_what_is_stated_is_true_and_said():
    for attributes, text, stated in captioned():
        found = read(text)
        for name, value in stated.items():
            if name.startswith('not '):
                assert attributes[name[4:]] != value, text
            else:
                assert attributes[name] == value, text
        for name in ('species', 'color'):
            if name in stated:
                assert stated[name] in found[dict(species='species', color='colors')[name]], text
        if 'not color' in stated:
            assert stated['not color'] in {COLORS.get(word) for word in found['denied']}, text
        assert ('place' in stated) == bool(found['places']), text


def test_captions_of_the_garden_are_true():
    "Fails if one denies what the garden does not have, or names the neighbor of another color."
    said = Counter()
    for i in range(3000):
        shown = garden.sample_attributes(4, i)
        text, stated = garden_caption(shown, random.Random(i))
        found = read(text)
        said.update({name: bool(values) for name, values in found.items()})
        said['neighbor'] += any(color in words.NEAREST_COLORS for color in found['colors'])
        assert set(found['species']) <= {shown['species']}, text
        assert {words.NEAREST_COLORS.get(color, color) for color in found['colors']} <= {shown['color']}, text
        assert set(found['places']) <= {shown['background']}, text
        for phrase in found['absent']:
            assert shown['background'] not in words.ABSENCES[phrase], text
            assert words.ABSENCES[phrase][0] in garden.BACKGROUNDS, text
        for word in found['denied']:
            assert COLORS.get(word) in GARDEN_COLORS or word in SPECIES, text
            assert COLORS.get(word) != shown['color'] and SPECIES.get(word) != shown['species'], text
        for name, value in stated.items():
            assert (shown[name.removeprefix('not ')] != value) == name.startswith('not '), text
    assert min(said.values()) > 60 and 150 < said['neighbor'] < 400, said


def test_captions_and_attributes_stay_the_same():
    lines = [
        json.dumps([attributes, text, sorted(map(str, stated.items()))])
        for attributes, text, stated in captioned(300)
    ]
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16] == 'dc2666d9fe5819a8'
    noisy = [text for i in range(100) for text in misspelled(['two purple tulips in the meadow'], str(i))]
    assert hashlib.sha256('\n'.join(noisy).encode()).hexdigest()[:16] == 'bae8d1f06e67acc1'


MEANS = [
    [143.6, 162.3, 202.9],
    [146.5, 183.5, 114.1],
    [107.5, 81.9, 68.9],
    [196.5, 207.1, 204.8],
    [107.9, 140.7, 117.4],
    [47.4, 52.4, 72.8],
]  # RGB
CLASSIC_MEANS = [[160.7, 176.2, 146.1], [155.3, 180.3, 186.9], [147.4, 170.9, 119.9]]


def test_pictures_stay_the_same():
    means = [np.asarray(flowers(8, i)[0]).mean((0, 1)) for i in range(6)]
    np.testing.assert_allclose(means, MEANS, atol=0.3)
    classic = [
        np.asarray(WORLDS['classic'].draw(WORLDS['classic'].sample(8, i), 8, i, 64)).mean((0, 1))
        for i in range(3)
    ]
    np.testing.assert_allclose(classic, CLASSIC_MEANS, atol=0.3)


def test_changed_captions_are_false():
    kinds = Counter()
    for i in range(400):
        attributes = sample_attributes(5, i)
        for change, (true, false) in changed_captions(attributes, random.Random(i)).items():
            kinds[change] += 1
            found = read(false)
            assert true != false
            own = {kind[0] for kind in kinds_of(attributes)}, {kind[1] for kind in kinds_of(attributes)}
            if change in ('place', 'species', 'color'):
                shown = dict(place={attributes['place']}, species=own[0], color=own[1])[change]
                key = dict(place='places', species='species', color='colors')[change]
                assert not set(found[key]) <= shown and set(read(true)[key]) <= shown, false
    assert set(kinds) == {'place', 'color', 'species', 'count', 'size', 'leaves', 'denial', 'exchange'}


def test_misspelling_is_small():
    rng = random.Random(0)
    for _ in range(500):
        text = 'a dark red rose in the garden'
        wrong = misspell(text, rng)
        pairs = list(zip(text.split(), wrong.split(), strict=True))
        changed = [(a, b) for a, b in pairs if a != b]
        assert 1 <= len(changed) <= 2
        assert all(len(a) >= 3 and a[0] == b[0] and abs(len(a) - len(b)) <= 1 for a, b in changed)
    assert misspell('a red lily', random.Random(0)).split()[0] == 'a'
    assert misspell('an i', rng) == 'an i'


def test_the_tokenizer_knows_each_word_and_shares_pieces():
    from flowerdiff.models.tokenizer import own_tokenizer

    texts = [text for _, text, _ in captioned(600)]
    noisy = [wrong for i, text in enumerate(texts) for wrong in misspelled([text], str(i))]
    pieces = own_tokenizer(texts + noisy, 3)
    assert all(
        len(token.replace('</w>', '')) <= 3 for token in pieces.get_vocab() if not token.startswith('<|')
    )
    for text in texts[:100]:
        back = pieces.decode(pieces(text, truncation=False).input_ids, skip_special_tokens=True)
        assert back.replace(' ', '') == text.lower().replace(' ', '')
    whole = own_tokenizer(texts + noisy)

    def shared(tokenizer):
        pairs = [
            (set(tokenizer.tokenize(a)), set(tokenizer.tokenize(b)))
            for a, b in (('yellow', 'yelow'), ('purple', 'purlpe'), ('sunflower', 'sunflwer'))
        ]
        return sum(len(a & b) for a, b in pairs)

    assert shared(pieces) > shared(whole)


def test_the_run_has_its_own_autoencoder():
    settings = load_profile('garden', {'prepare.garden': 'mixed'})
    assert settings.components.autoencoder == 'mixed_garden'
    assert settings.components.text_encoder == 'garden'
    given = load_profile('garden', {'prepare.garden': 'mixed', 'components.autoencoder': 'photo'})
    assert given.components.autoencoder == 'photo'
    assert load_profile('garden').components.text_encoder == 'garden'


@pytest.fixture(scope='module')
def described(tmp_path_factory):
    "A workspace with 60 pictures of the mixed garden and their captions, and the result of prepare."
    from flowerdiff.stages import caption as caption_stage
    from flowerdiff.stages import prepare

    root = tmp_path_factory.mktemp('mixed') / 'w'
    prepared = prepare.run(root, 'garden', {'prepare.garden': 'mixed', 'prepare.count': 60})
    caption_stage.run(root)
    return read_workspace(root), prepared


def all_rows(ws):
    return {
        f'{split}/{row["file_name"]}': row
        for split in ('train', 'val', 'test')
        for row in read_jsonl(ws.pictures / split / 'metadata.jsonl')
    }


def test_prepare_and_caption(described):
    ws, prepared = described
    rows = all_rows(ws)
    texts = read_jsonl(ws.captions / 'metadata.jsonl')
    assert len(texts) == 60
    for line in texts:
        row = rows[line['file_name']]
        assert (
            row['source'].startswith('mixed garden ') and row['other_species'] in CLASSIFIED['other_species']
        )
        assert (row['label'] == '') == (len({kind[:2] for kind in kinds_of(row)}) == 2)
        for text in line['captions']:
            assert set(read(text)['species']) <= {kind[0] for kind in kinds_of(row)}, text
    held = {tuple(x) for x in prepared.info['held_out']}
    seen = [row for name, row in rows.items() if name.startswith('train/')]
    assert not any(WORLDS['mixed'].combinations(row) & held for row in seen)


def test_the_report_asks_for_everything_that_it_checks(described):
    from flowerdiff.evaluation.eval_prompts import eval_prompts, garden_prompt

    ws, _ = described
    rows = all_rows(ws)
    seen = set().union(*(place_combinations(row) for name, row in rows.items() if name.startswith('train/')))
    for split in ('test', 'val'):
        for p in eval_prompts(ws, 9, split):
            row = rows[f'{split}/{p.file}']
            assert p.attributes == {name: row[name] for name in WORLDS['mixed'].asked}
            assert p.unseen == bool(place_combinations(row) - seen)
    for i in range(200):
        attributes = sample_attributes(6, i)
        text = garden_prompt(attributes, random.Random(i))
        found = read(text)
        assert set(found['species']) == {kind[0] for kind in kinds_of(attributes)}, text
        assert set(found['colors']) == {kind[1] for kind in kinds_of(attributes)}, text
        assert found['places'] == [attributes['place']], text


def test_the_bundled_networks_know_the_garden():
    "New pictures: the classifier names what they show, also after the autoencoder, whose pictures are sharp."
    from diffusers import AutoencoderTiny

    from flowerdiff.evaluation.metrics import adherence
    from flowerdiff.models.attribute_classifier import load_classifier, round_trips
    from flowerdiff.models.tiny_autoencoder import reconstruction_psnr, to_tensor
    from flowerdiff.services.hub_cache import bundled_part

    drawn = [flowers(77, i) for i in range(100)]
    pictures = np.stack([np.asarray(picture) for picture, _ in drawn])
    wanted = [{name: own[name] for name in WORLDS['mixed'].asked} for _, own in drawn]
    autoencoder = AutoencoderTiny.from_pretrained(bundled_part('mixed_garden', 'vae')).eval()
    assert reconstruction_psnr(autoencoder, pictures) > LEAST_PSNR
    classifier = load_classifier('mixed_garden')
    assert classifier.attributes == CLASSIFIED
    for shown in (pictures, round_trips(pictures, autoencoder, 0)):
        shares = adherence(wanted, classifier.names(to_tensor(shown)))
        assert shares['all'].value > 0.9, shares


def tiny_training(tmp_path, kind, resume, steps=6):
    "Train a tiny network of a kind, with one line for each step."
    from flowerdiff.models.attribute_classifier import train_classifier
    from flowerdiff.models.clip import train_clip
    from flowerdiff.models.tiny_autoencoder import train_autoencoder
    from flowerdiff.models.tokenizer import train_tokenizer

    drawn = [flowers(3, i) for i in range(12)]
    pictures = np.stack([np.asarray(picture) for picture, _ in drawn])
    texts = [[caption(attributes, random.Random(i))[0]] for i, (_, attributes) in enumerate(drawn)]
    if kind == 'clip':
        return train_clip(
            pictures,
            texts,
            tmp_path / 'clip',
            steps=steps,
            width=32,
            layers=1,
            batch_size=4,
            tokenizer=train_tokenizer(['a rose']),
            resume=resume,
        )[0]
    if kind == 'autoencoder':
        return train_autoencoder(
            pictures,
            tmp_path / 'ae',
            steps=steps,
            width=8,
            latent_channels=6,
            equivariance=0.5,
            held_out=4,
            batch_size=4,
            resume=resume,
        )
    attributes = [attributes for _, attributes in drawn]
    return train_classifier(
        pictures, attributes, CLASSIFIED, tmp_path / 'c', steps=steps, width=8, batch_size=12, resume=resume
    )


@pytest.mark.parametrize('kind', ['clip', 'classifier', 'autoencoder'])
def test_a_killed_training_goes_on(tmp_path, monkeypatch, kind):
    import torch

    from flowerdiff.services import training_state

    monkeypatch.setattr(training_state, 'SAVE_MINUTES', 0)
    whole = tiny_training(tmp_path, kind, None)
    write = training_state.TrainingState.write

    def killed(self, step):
        write(self, step)
        if step == 4:
            raise KeyboardInterrupt

    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(training_state.TrainingState, 'write', killed)
        with pytest.raises(KeyboardInterrupt):
            tiny_training(tmp_path, kind, tmp_path / 'state.safetensors')
    monkeypatch.setattr(
        training_state.TrainingState, 'write', lambda self, step: (steps.append(step), write(self, step))
    )
    resumed = tiny_training(tmp_path, kind, tmp_path / 'state.safetensors')
    assert steps == [5, 6] and not (tmp_path / 'state.safetensors').exists()
    if kind != 'autoencoder':  # whose two threads draw noise in any order
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
            torch.testing.assert_close(a, b)


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_free_prompts_are_checked():
    free = benchmark('free_prompts')
    rows = free.read_prompts(free.PROMPTS)
    assert len(rows) == 280 and len({row['prompt'] for row in rows}) == 280
    known = [row for row in rows if 'unknown' not in row['must']]
    assert all(free.can_see(row['must'], CLASSIFIED) for row in known)
    new = free.read_prompts(BENCHMARKS / 'free_prompts_unseen_2.jsonl')
    assert len({row['prompt'] for row in new}) == 150
    shown = dict(species=SPECIES.values(), color=tuple(GARDEN_COLORS), background=garden.BACKGROUNDS)
    for row in new:
        assert 'unknown' in row['must'] or free.can_see(
            free.in_colors(row['must'], tuple(GARDEN_COLORS)), shown
        )
    classic = dict(species=['rose'], color=['red'], background=['meadow'], count=[1, 3])
    assert free.can_see(dict(species='rose', place='meadow'), classic)
    assert not free.can_see(dict(color='maroon'), classic) and not free.can_see(dict(size='small'), classic)
    rose = dict(species='rose', color='red', other_species=NONE, other_color=NONE, count=1, place='snow')
    both = rose | dict(species='tulip', color='yellow', other_species='rose', other_color='red', count=2)
    for must, found, right in (
        (dict(species='rose', color='red', count=1), rose, True),
        (dict(species='rose', color='blue'), rose, False),
        (dict(species='rose'), both, False),
        ({'not color': 'red'}, rose, False),
        ({'not species': 'rose'}, both, False),
        ({'not place': 'meadow'}, rose, True),
        ({'least count': 2}, rose, False),
        ({'least count': 2}, both, True),
        (dict(species='rose', color='red', other_species='tulip', other_color='yellow'), both, True),
        (dict(species='rose', color='yellow', other_species='tulip', other_color='red'), both, False),
        (dict(species='rose', other_species='tulip'), rose, False),
        (dict(place='beach'), rose, False),
    ):
        assert free.shows(must, found) == right, (must, found)
    text = free.table(
        [dict(kind='a', right=[True, False]), dict(kind='a', right=None), dict(kind='b', right=[True])]
    )
    assert '| a | 50% | 2 | 1 |' in text and '| all | 67% | 3 | 1 |' in text
