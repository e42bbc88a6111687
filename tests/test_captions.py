"""What becomes of the texts that came with pictures, and which captions stop a run.

The stage reads only tables, so no picture is drawn: `pictures` writes what the stage prepare would.
"""

import io
import random
from types import SimpleNamespace

import pytest

from flowerdiff.core.errors import UserError
from flowerdiff.core.files import read_json, write_json
from flowerdiff.core.profiles import load_profile
from flowerdiff.core.workspace import open_workspace, read_jsonl, write_jsonl
from flowerdiff.pipeline.execute import _print_result, stage_line
from flowerdiff.pipeline.pipeline import _DvcRun
from flowerdiff.stages import caption

QUICK = {'components.text_encoder': 'garden', 'caption.class_captions': 0}


def pictures(root, texts, rows=None, metadata=None):
    "A workspace after prepare. `texts`: one dict per picture, or None for a workspace without texts.jsonl."
    ws = open_workspace(root / 'ws', 'folder', QUICK | {'prepare.source': str(root)})
    n = len(texts or rows)
    rows = rows or [{}] * n
    known = [
        dict(file_name=f'{i:06}.png', source=f'{i}.jpg', sha256=f'{i}', **row) for i, row in enumerate(rows)
    ]
    splits = dict(train=known[: n - 2], val=known[n - 2 : n - 1], test=known[n - 1 :])
    for split, own in splits.items():
        (ws.pictures / split).mkdir(parents=True, exist_ok=True)
        write_jsonl(ws.pictures / split / 'metadata.jsonl', own)
    counts = {split: len(own) for split, own in splits.items()}
    write_json(ws.pictures / 'info.json', dict(counts=counts, metadata=metadata or {}))
    if texts:
        names = [f'{split}/{row["file_name"]}' for split, own in splits.items() for row in own]
        lines = [dict(file_name=name, texts=own) for name, own in zip(names, texts)]
        write_jsonl(ws.pictures / 'texts.jsonl', lines)
    return ws


def captions(ws, **settings):
    "The captions of each picture."
    caption.run(ws.root, overrides={f'caption.{key}': value for key, value in settings.items()})
    return [row['captions'] for row in read_jsonl(ws.captions / 'metadata.jsonl')]


def one_line(error, *words):
    text = str(error.value)
    assert '\n' not in text and all(word in text for word in words), text


OTHERS = [dict(caption=[f'another picture, {i}']) for i in range(3)]  # so that captions are not all alike

FORMS = {  # name -> texts of a picture, settings, its captions
    'text': (dict(text=['Eine Röte']), {}, ['Eine Röte']),
    'caption': (dict(caption=['A Red Rose.']), {}, ['A Red Rose.']),
    'prompt': (dict(prompt=['a rose']), {}, ['a rose']),
    'description': (dict(description=['a rose']), {}, ['a rose']),
    'capitals': (dict(TEXT=['a rose'], URL=['https://a.b/c.jpg']), {}, ['a rose']),
    'list': (dict(captions=[['a rose', '一朵玫瑰']]), {}, ['a rose', '一朵玫瑰']),
    'list as text': (dict(captions=["['a rose', 'it is red']"]), {}, ['a rose', 'it is red']),
    'rows': (dict(text=[f'rose {i}' for i in range(5)]), {}, [f'rose {i}' for i in range(5)]),
    'number': (dict(text=[7]), {}, ['7']),
    'records': (dict(captions=[[{'caption': 'a rose', 'id': 83, 'score': 0.9}]]), {}, ['a rose']),
    'tags': (dict(tags=[['rose', 'red vase']]), {}, ['rose, red vase']),
    'tags with scores': (dict(tags=[{'rose': 0.98, 'red': 0.4}]), {}, ['rose, red']),
    'tags as text': (dict(tags=['rose,red ,vase']), {}, ['rose, red, vase']),
    'languages': (dict(caption=[{'de': 'Rose', 'en': 'a rose'}]), {}, ['a rose']),
    'language': (
        dict(caption=[{'de': ['Rose', 'Blume'], 'en': 'a rose'}]),
        dict(language='de'),
        ['Rose', 'Blume'],
    ),
    'region': (dict(caption=[{'de': 'Rose', 'en-US': 'a rose'}]), {}, ['a rose']),
    'sidecar': (dict(sidecar=['A rose\nin a vase\n']), {}, ['A rose in a vase']),
    'lines': (dict(sidecar=['A rose\n\nin a vase\n']), dict(lines=True), ['A rose', 'in a vase']),
    'first column': (dict(tags=[['x']], text=['a rose'], id=[7]), {}, ['a rose']),
    'chosen column': (dict(tags=[['x']], caption=['b'], title=['a rose']), dict(column='title'), ['a rose']),
    'empty column': (dict(caption=[''], text=['a rose']), {}, ['a rose']),
    'address': (dict(text=['https://a.b/c.jpg'], tags=['rose']), {}, ['rose']),
    'only ids': (dict(id=[7], score=[0.5], url=['https://a.b']), {}, ['a picture']),
}


def test_forms(tmp_path):
    "Fails if a branch of `value_captions`, `value_tags`, `dict_values` or `given_captions` is taken out."
    by_settings = {}
    for name, (_, settings, _) in FORMS.items():
        by_settings.setdefault(tuple(settings.items()), []).append(name)
    for i, (settings, names) in enumerate(by_settings.items()):
        key = dict(settings).get('column', 'caption')
        others = [{key: other['caption']} for other in OTHERS]
        ws = pictures(tmp_path / f'{i}', [*(FORMS[name][0] for name in names), *others])
        said = dict(zip(names, captions(ws, **dict(settings))))
        assert said == {name: FORMS[name][2] for name in names}


def test_shuffled_tags(tmp_path):
    "Fails if the tags are not shuffled, if the first do not stay, or if the order depends on the call."
    texts = [dict(sidecar=['1girl, solo, long_hair, smile, red_eyes']), dict(tags=[list('abcdef')]), *OTHERS]
    ws = pictures(tmp_path, texts)
    plain = captions(ws)
    shuffled = captions(ws, shuffle_tags=True, keep_tokens=2, per_picture=4)
    assert plain[:2] == [['1girl, solo, long_hair, smile, red_eyes'], ['a, b, c, d, e, f']]
    for own, all_tags in zip(shuffled, plain[:2]):
        assert len(set(own)) == 4
        assert {tuple(text.split(', ')[:2]) for text in own} == {tuple(all_tags[0].split(', ')[:2])}
        assert {tuple(sorted(text.split(', '))) for text in own} == {tuple(sorted(all_tags[0].split(', ')))}
    assert captions(ws) == shuffled


def test_what_is_not_used_is_said(tmp_path):
    "Fails if `Overview.unused` is not filled, or if `caption.column` is not checked."
    texts = [dict(text=[f'rose {i}'], prompt=[f'rose, {i}'], copy=['x'], tags=[]) for i in range(6)]
    ws = pictures(tmp_path, texts)
    result = caption.run(ws.root)
    assert result.details[:2] == [
        '6 from the column text',
        'not used: prompt (6); caption.column chooses a column',
    ]
    assert {row['column'] for row in read_jsonl(ws.captions / 'metadata.jsonl')} == {'text'}
    with pytest.raises(UserError) as e:
        captions(ws, column='titel')
    one_line(e, 'caption.column', 'titel', 'text, prompt, copy, tags')
    assert captions(ws, column='Prompt')[0] == ['rose, 0']


def test_a_language_that_is_missing_is_said(tmp_path):
    "Fails if pictures without the language get a caption in another one, or silently none."
    ws = pictures(tmp_path, [dict(caption=[{'de': 'Rose', 'fr': 'rose'}]), *OTHERS])
    result = caption.run(ws.root)
    assert 'no caption in en, but in de (1), fr (1); caption.language chooses a language' in result.details
    assert captions(ws, language='de')[0] == ['Rose']


def test_ids_and_scores_are_no_attributes(tmp_path):
    "Fails if `describes_picture` lets a number, an address, a date or a hash pass."
    columns = dict(
        shade='dark red', petals=5, image_id=83, clip_score=0.31234, url='https://a.b', row=1234567
    )
    columns |= dict(taken='2019-05-03', digest='9f86d081884c7d659a2feaa0', path='a/b.png', caption='x')
    rows = [dict(attributes=columns | dict(petals=i)) for i in range(4)]
    ws = pictures(tmp_path, [{} for _ in rows], rows)
    texts = [text for own in captions(ws, per_picture=8) for text in own]
    words = {word.strip(',:') for text in texts for word in text.split()}
    assert words <= {'a', 'picture', 'photo', 'dark', 'red', 'petals', '0', '1', '2', '3'}, words


def test_file_names(tmp_path):
    "Fails if the counter stays, if a camera's name becomes a caption, or if auto uses file names."
    names = ('red_rose-garden_012.jpg', 'Wei%C3%9Fe_Lilie (3).png', 'IMG_2031.jpg', 'iris.png')
    ws = pictures(tmp_path, [{} for _ in names], [dict(label='flower')] * 4)
    for split in ('train', 'val', 'test'):
        file = ws.pictures / split / 'metadata.jsonl'
        write_jsonl(file, [row | dict(source=names[int(row['file_name'][:6])]) for row in read_jsonl(file)])
    said = captions(ws, captioner='filenames', accept='same_captions')
    assert [own[0] for own in said[:2]] == ['red rose garden', 'Weiße Lilie'] and said[3] == ['iris']
    assert all('flower' in text for text in said[2])
    assert all('flower' in text for own in captions(ws, captioner='auto') for text in own)


def test_class_captions(tmp_path):
    "Fails if the default is 0, if a caption that names the class gets more, or if numbers are names."
    labels = ('water lily', 'water lily', '83', '睡莲', '')
    texts = [
        dict(text=[text]) for text in ('it has petals', 'Two Water-Lilies', 'it has 5', '白睡莲', 'it is')
    ]
    ws = pictures(tmp_path, texts, [dict(label=label) for label in labels])
    assert load_profile('folder').caption.class_captions == 2
    assert load_profile('garden').caption.class_captions == 0
    said = captions(ws, class_captions=2)
    assert said[0][0] == 'it has petals' and len(said[0]) == 3
    assert all('water lily' in text for text in said[0][1:])
    assert said[1:] == [['Two Water-Lilies'], ['it has 5'], ['白睡莲'], ['it is']]
    result = caption.run(ws.root)
    assert result.details[0] == '5 from the column text; 1 also with the name of their class'


def test_without_texts_the_rows_have_the_captions(tmp_path):
    "Fails if a workspace of an older version loses its captions."
    ws = pictures(tmp_path, None, [dict(captions=[f'a rose {i}']) for i in range(4)])
    assert captions(ws)[0] == ['a rose 0']


# ---- what stops a run

LONG = (
    'a photograph of a crimson rose with a yellow butterfly in front of a wall of grey stones and bricks'
    ' with a blue door behind'
)
REASON = 'looks like metadata, but its ending is not; rename it to metadata.jsonl'
SLIP = dict(file='metadata.json1', reason=REASON)
STOPS = {  # name in caption.accept -> texts, metadata, words of the line
    'unused_files': (OTHERS, dict(not_used=[SLIP]), ('metadata.json1', 'rename it to metadata.jsonl')),
    'unmatched_rows': (
        OTHERS,
        dict(files=['metadata.csv'], rows=20, matched=17, unmatched=['metadata.csv line 3 describes x.png']),
        ('metadata.csv: 3 of 20 rows match no picture', 'x.png', 'file_name'),
    ),
    'same_captions': ([dict(caption=['a flower'])] * 4, {}, ('all 4 pictures', '"a flower"', 'what each')),
    'cut_captions': (
        [dict(caption=[f'{LONG} {i}']) for i in range(2)] + OTHERS,
        {},
        ('2 of 5 pictures', '40 tokens', 'blue door behind 0', 'components.text_encoder'),
    ),
}


@pytest.mark.parametrize('stop', STOPS)
def test_stops_and_goes_on_if_accepted(stop, tmp_path):
    "Fails if the check is taken out, comes after the old captions are gone, or ignores caption.accept."
    texts, metadata, words = STOPS[stop]
    good = pictures(tmp_path, OTHERS)
    captions(good)
    before = (good.captions / 'metadata.jsonl').read_bytes()
    ws = pictures(tmp_path, texts, metadata=metadata)
    with pytest.raises(UserError) as e:
        caption.run(ws.root)
    one_line(e, *words, f'--set caption.accept={stop}')
    assert (ws.captions / 'metadata.jsonl').read_bytes() == before
    assert not list(ws.root.glob('.captions*'))
    assert len(captions(ws, accept=stop)) == len(texts)
    accepted = load_profile('folder', [f'caption.accept={stop},same_captions']).caption.accept
    assert accepted == [stop, 'same_captions']


@pytest.mark.parametrize('stop', ['unmatched_rows', 'cut_captions'])
def test_up_to_the_limit_nothing_stops(stop, tmp_path):
    "Fails if the limit of a tenth of the rows, or of a fifth of the pictures, is lower."
    texts = [dict(caption=[LONG])] + [dict(caption=[f'rose {i}']) for i in range(4)]
    metadata = dict(rows=20, matched=18) if stop == 'unmatched_rows' else {}
    assert len(captions(pictures(tmp_path, texts, metadata=metadata))) == 5


def test_lines_of_a_text_file_are_named_if_they_are_cut(tmp_path):
    "Fails if ten captions in the lines of a file are cut without naming the setting for them."
    lines = [f'the petals of flower {i} are long and white' for i in range(10)]
    ws = pictures(tmp_path, [dict(sidecar=['\n'.join(lines[i:] + lines[:i])]) for i in range(4)])
    with pytest.raises(UserError) as e:
        caption.run(ws.root)
    one_line(e, 'cut_captions', 'caption.lines to true')
    assert captions(ws, lines=True)[0] == lines


def test_no_captions_at_all(tmp_path):
    "Fails if a folder of nothing but pictures trains on 'a picture' without a word."
    ws = pictures(tmp_path, [{}] * 4)
    with pytest.raises(UserError) as e:
        caption.run(ws.root)
    one_line(e, 'no picture has a caption', 'NAME.txt', 'metadata.csv', 'caption.accept=same_captions')
    assert captions(ws, accept='same_captions') == [['a picture']] * 4


@pytest.mark.parametrize('folder, stops', [('10_sks flower', False), ('holiday', True)])
def test_one_class_for_all(folder, stops, tmp_path):
    "Fails if different sentences with one class pass, or if the subject of a Kohya folder stops."
    label = folder.removeprefix('10_')
    ws = pictures(tmp_path, [{}] * 4, [dict(label=label)] * 4)
    for split in ('train', 'val', 'test'):
        file = ws.pictures / split / 'metadata.jsonl'
        write_jsonl(file, [row | dict(source=f'{folder}/{row["source"]}') for row in read_jsonl(file)])
    if stops:
        with pytest.raises(UserError) as e:
            caption.run(ws.root)
        one_line(e, f'"{label}"', 'same_captions')
    else:
        assert all(label in text for own in captions(ws) for text in own)


def test_the_first_stop_comes_before_florence(tmp_path, monkeypatch):
    "Fails if a model captions for hours before the line about the metadata."
    monkeypatch.setattr(caption, 'florence_answers', lambda ws: pytest.fail('Florence ran'))
    ws = pictures(tmp_path, OTHERS, metadata=dict(not_used=[SLIP]))
    with pytest.raises(UserError, match='metadata'):
        caption.run(ws.root, overrides={'caption.captioner': 'florence'})


def test_own_text_encoder_is_long_enough(tmp_path):
    "Fails if tokens are estimated, or if the length is made of words: rare ones have many tokens."
    rng = random.Random(0)
    words = [''.join(rng.choices('abcdefghijklmnop', k=9)) for _ in range(400)]
    texts = [dict(text=[' '.join(rng.choices(words, k=12))]) for _ in range(30)]
    ws = pictures(tmp_path, texts)
    with pytest.raises(UserError) as e:  # the garden's text encoder reads 40 tokens
        caption.run(ws.root)
    one_line(e, '30 of 30 pictures', 'set components.text_encoder to train')
    caption.run(ws.root, overrides={'components.text_encoder': 'train', 'caption.accept': []})
    lint = read_json(ws.captions / 'lint.json')
    assert lint['exact_tokens'] and lint['max_tokens'] > 32 and lint['cut_pictures'] <= 3


# ---- what the terminal shows


def test_the_terminal_shows_who_captions_and_three_examples(tmp_path, capsys):
    "Fails if the stage's lines do not reach the record, the stage's process or the run's display."
    texts = [dict(text=[f'A Rose, {i}']) for i in range(9)]
    ws = pictures(tmp_path, texts)
    caption.run(ws.root)
    capsys.readouterr()
    _print_result(ws, 'caption', 1.0)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == stage_line('caption', '...', '9 from the column text')
    assert [line.split()[2:] for line in printed[1:4]] == [
        ['"A', 'Rose,', f'{i}"', f'({i}.jpg)'] for i in (0, 3, 6)
    ]
    run = SimpleNamespace(stage='caption', tail=[], ran=[], show_messages=lambda: None)
    out = io.StringIO()
    run.display = SimpleNamespace(line=lambda line: print(line, file=out))
    for line in printed:
        _DvcRun.handle(run, line)
    assert out.getvalue().splitlines() == printed and run.stage is None


def test_the_run_stops_with_one_line(tmp_path, cli):
    "Fails if a stop of the stage reaches the terminal as a traceback, or exits with 0."
    ws = pictures(tmp_path, [dict(caption=['a flower'])] * 4)
    p = cli('run', ws.root, '--only', 'caption')
    assert p.returncode == 2
    last = p.stderr.splitlines()[-1]
    assert (
        'all 4 pictures have the same caption, "a flower"' in last and 'caption.accept=same_captions' in last
    )
    assert 'Traceback' not in p.stdout + p.stderr and not ws.captions.exists()
