"Captioning with a miniature Florence-2: batches, interrupted runs, several processes, memory, other models."

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tiny import tiny_florence

from flowerdiff.core.errors import UserError
from flowerdiff.core.files import read_json, write_json
from flowerdiff.core.workspace import open_workspace, read_jsonl, write_jsonl
from flowerdiff.data.caption_cleanup import clean_caption, mention
from flowerdiff.data.captioning import (
    describe_distributed,
    describe_share,
    largest_first,
    read_journals,
    run_worker,
)
from flowerdiff.models.florence import Florence, open_florence
from flowerdiff.services.launcher import Journal
from flowerdiff.stages.caption import run

LABELS = 'oxeye daisy', 'iris', 'canterbury bells', ''
COUNTS = dict(train=20, val=3, test=2)
real_answers = Florence.answers
real_inputs = Florence.inputs


@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    return tiny_florence(tmp_path_factory.mktemp('mini') / 'florence')


def random_picture(rng, scale):
    pixels = rng.integers(0, 255, (4, 4, 3), np.uint8)
    return Image.fromarray(np.kron(pixels, np.ones((8 * scale, 8 * scale, 1), np.uint8)))


def make(root, mini, **settings):
    """A workspace with 25 images of three sizes, as the stage prepare leaves them.

    Every fourth image has no label, and the first of each split has a given caption.
    """
    quick = dict(model=str(mini), batch_size=4, num_beams=1, max_new_tokens=16)
    settings = dict(captioner='florence', class_captions=0) | quick | settings
    ws = open_workspace(root, 'folder', {f'caption.{key}': value for key, value in settings.items()})
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        folder = ws.pictures / split
        folder.mkdir(parents=True)
        rows = []
        for i in range(count):
            random_picture(rng, 1 + i % 3).save(folder / f'{i:06}.png')
            rows.append(dict(file_name=f'{i:06}.png', sha256=f'{split}{i}', label=LABELS[i % 4]))
        rows[0]['captions'] = ['its own']
        write_jsonl(folder / 'metadata.jsonl', rows)
    write_json(ws.pictures / 'info.json', dict(counts=COUNTS))
    return ws


def change(ws, **settings):
    return open_workspace(ws.root, None, {f'caption.{key}': value for key, value in settings.items()})


def captions_of(ws):
    "File -> (captions, captioner)."
    rows = read_jsonl(ws.captions / 'metadata.jsonl')
    return {row['file_name']: (row['captions'], row['captioner']) for row in rows}


def label(file):
    return LABELS[int(Path(file).stem) % 4]


def batch_events(folder):
    "The batches in the journals of a folder, as (journal, keys)."
    return [
        (journal, list(event['answers']))
        for journal in sorted(folder.glob('*-*.jsonl'))
        for event in map(json.loads, journal.read_text().split('\n')[:-1])
        if event['event'] == 'batch'
    ]


def batches(folder):
    return [keys for journal in sorted(folder.glob('caption-*')) for _, keys in batch_events(journal)]


@pytest.fixture
def asked(monkeypatch):
    "The batch size of each call of the model."
    sizes = []

    def answers(self, inputs, task):
        sizes.append(len(inputs['pixel_values']))
        return real_answers(self, inputs, task)

    monkeypatch.setattr(Florence, 'answers', answers)
    return sizes


@pytest.fixture(scope='module')
def whole(mini, tmp_path_factory):
    "A workspace that was captioned without interruption."
    ws = make(tmp_path_factory.mktemp('whole') / 'ws', mini)
    (ws.root.parent / 'summary.txt').write_text(run(ws.root).summary)
    return ws


# ---- captions


def test_every_picture_is_described_under_its_name(whole):
    captions = captions_of(whole)
    assert len(captions) == 25
    assert {captioner for _, captioner in captions.values()} == {'florence'}
    for file, ([text], _) in captions.items():
        assert text == text.strip(' .')
        assert '<' not in text
        assert not label(file) or mention(label(file)).search(text), text
    assert len({text for [text], _ in captions.values()}) > 15, 'different images have different captions'
    answers = read_journals(next(whole.work.glob('caption-*')))
    raw = {key: answer for (_, key), answer in answers.items()}
    assert len(raw) == 25
    assert not any(mention('oxeye daisy').search(answer) for answer in raw.values()), (
        'the journal keeps the output of the model'
    )
    summary = (whole.root.parent / 'summary.txt').read_text()
    assert 'florence' in summary and 'pictures/s' in summary


def test_largest_pictures_first(whole):
    pictures, _keys = largest_first(whole.pictures, list(captions_of(whole)))
    assert [key for batch in batches(whole.work) for key in batch] == [key for key, _ in pictures]
    sides = [Image.open(whole.pictures / file).width for _, file in pictures]
    assert sides == sorted(sides, reverse=True)
    assert len(set(sides)) == 3


@pytest.mark.parametrize('beams', [1, 3])
def test_alone_as_in_a_batch(mini, whole, beams):
    florence = open_florence(mini, num_beams=beams, max_new_tokens=16)
    pictures = [Image.open(whole.pictures / file) for file in captions_of(whole)]
    for task in ('<CAPTION>', '<DETAILED_CAPTION>'):
        together = florence.describe(pictures, task)
        assert together == [florence.describe([picture], task)[0] for picture in pictures]
        assert not any('<' in text for text in together)
        assert len({len(text.split()) for text in together}) > 1, (
            'captions of different lengths, so that the short ones are padded in a batch'
        )
        if beams > 1:
            greedy = open_florence(mini, num_beams=1, max_new_tokens=16)
            assert together != greedy.describe(pictures, task)


def test_several_prompts_and_a_grown_collection_ask_for_what_is_new(mini, tmp_path, asked):
    ws = make(tmp_path / 'ws', mini)
    run(ws.root)
    first = captions_of(ws)
    assert sum(asked) == 25
    run(change(ws, prompts=['<CAPTION>', '<DETAILED_CAPTION>']).root)
    assert sum(asked) == 50
    for file, (texts, _) in captions_of(ws).items():
        assert len(texts) == 2
        assert texts[-1] == first[file][0][0]
    train = ws.pictures / 'train'
    shutil.copy(ws.pictures / 'val' / '000000.png', train / '000020.png')  # a known image, another name
    Image.new('RGB', (16, 16), 'red').save(train / '000021.png')
    rows = read_jsonl(train / 'metadata.jsonl')
    rows += [dict(file_name=f'{i:06}.png', label='') for i in (20, 21)]
    write_jsonl(train / 'metadata.jsonl', rows)
    run(ws.root)
    assert sum(asked) == 52 and len(captions_of(ws)) == 27
    assert 'pictures/s' not in run(ws.root).summary and sum(asked) == 52
    run(change(ws, prompts=['<CAPTION>'], max_new_tokens=5).root)
    assert sum(asked) == 52 + 26, 'other settings give other captions'


def test_given_captions_win_unless_florence_is_asked_for(mini, whole, tmp_path):
    ws = make(tmp_path / 'ws', tmp_path / 'no model here')
    run(change(ws, captioner='auto', class_captions=0).root)
    captions = captions_of(ws)
    assert captions['train/000000.png'] == (['its own'], 'given')
    assert captions['train/000001.png'][1] == 'labels'
    assert captions_of(whole)['train/000000.png'][1] == 'florence'


def test_no_answer_leaves_the_picture_to_the_next_captioner(mini, tmp_path, monkeypatch):
    def no_answers(self, inputs, task):
        return ['</s>'] * len(inputs['pixel_values'])

    def first_answer_only(self, inputs, task):
        return ['A flower.'] + [''] * (len(inputs['pixel_values']) - 1)

    ws = make(tmp_path / 'ws', mini)
    monkeypatch.setattr(Florence, 'answers', no_answers)
    with pytest.raises(UserError, match='is florence, but no picture has'):
        run(ws.root)
    assert not ws.captions.exists()
    monkeypatch.setattr(Florence, 'answers', first_answer_only)
    summary = run(change(ws, max_new_tokens=9).root).summary
    captioners = {file: captioner for file, (_, captioner) in captions_of(ws).items()}
    assert set(captioners.values()) == {'florence', 'given', 'labels', 'nothing'}
    assert 'florence 7' in summary
    for file, captioner in captioners.items():
        fallback = 'labels' if label(file) else 'nothing'
        if file.endswith('000000.png'):
            fallback = 'given'
        assert captioner in ('florence', fallback)


# ---- interrupted runs and several processes


def slow_run(root, calls):
    "Run the stage slowly, and log the size of each batch before the model sees it."

    def slow(self, inputs, task):
        with open(calls, 'a', encoding='utf-8') as file:
            file.write(f'{len(inputs["pixel_values"])}\n')
        time.sleep(0.04)
        return real_answers(self, inputs, task)

    Florence.answers = slow
    run(root)


def start(root, calls):
    search_path = [str(Path(__file__).parent), *filter(None, [os.environ.get('PYTHONPATH')])]
    os.environ['PYTHONPATH'] = os.pathsep.join(search_path)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['test_florence'])
    process = context.Process(target=slow_run, args=(str(root), str(calls)))
    process.start()
    return process


def test_killed_at_random_points_it_redoes_a_batch_at_most(mini, whole, tmp_path):
    ws = make(tmp_path / 'ws', mini)
    rng = random.Random(0)
    kills = 3
    calls = tmp_path / 'calls'
    calls.write_text('')

    def batch_sizes():
        return list(map(int, calls.read_text().split()))

    for _ in range(kills):
        process = start(ws.root, calls)
        wanted = len(batch_sizes()) + rng.randint(1, 2)
        end = time.time() + 100
        while len(batch_sizes()) < wanted and process.exitcode is None and time.time() < end:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not ws.captions.exists()
    with open(sorted(ws.work.glob('caption-*/*-*.jsonl'))[-1], 'a', encoding='utf-8') as file:
        file.write('{"event": "batch", "task": "<DETAILED_CAPTION>", "answ')  # a truncated line
    process = start(ws.root, calls)
    process.join()
    assert process.exitcode == 0
    assert captions_of(ws) == captions_of(whole)
    assert 25 <= sum(batch_sizes()) <= 25 + 4 * kills, 'at most one batch per kill is repeated'
    keys = [key for batch in batches(ws.work) for key in batch]
    assert len(set(keys)) == 25 <= len(keys) == 25, 'no caption is written twice'


def kill_rank(rank, done):
    "Kill a worker process as soon as it exists."
    while not done.is_set():
        for process in psutil.Process().children(recursive=True):
            try:
                command = process.cmdline()
                is_worker = 'flowerdiff.data.captioning' in command and 'torch.distributed.run' not in command
                if is_worker and process.environ().get('RANK') == rank:
                    process.kill()
                    return
            except psutil.Error:
                pass
        time.sleep(0.02)


def test_two_processes_give_the_same_captions_and_a_killed_one_is_reported(mini, whole, tmp_path, asked):
    ws = make(tmp_path / 'ws', mini, num_processes=2)
    folder = ws.work / next(whole.work.glob('caption-*')).name
    folder.mkdir(parents=True)
    journal = next(whole.work.glob('caption-*/0-0.jsonl')).read_text().splitlines(keepends=True)
    (folder / '0-0.jsonl').write_text(''.join(journal[:2]))  # two batches of an earlier run
    done = threading.Event()
    killer = threading.Thread(target=kill_rank, args=('1', done))
    killer.start()
    try:
        with pytest.raises(
            UserError, match=r'a process ended without a message.*run again: what is done stays'
        ) as e:
            run(ws.root)
    finally:
        done.set()
        killer.join()
    assert '\n' not in str(e.value)
    assert not ws.captions.exists()
    assert len(read_journals(folder)) >= 8

    known = {key for _, key in read_journals(folder)}
    summary = run(ws.root).summary
    assert captions_of(ws) == captions_of(whole)
    assert 'pictures/s' in summary
    assert not asked, 'the model runs in the worker processes only'
    after = [
        (journal.name[0], key) for journal, keys in batch_events(folder) for key in keys if key not in known
    ]
    assert {rank for rank, _ in after} == {'0', '1'}
    assert len({key for _, key in after}) == len(after) == 25 - len(known), 'each did its share, none twice'


def test_an_interrupted_stage_ends_its_processes(mini, tmp_path, monkeypatch):
    ws = make(tmp_path / 'ws', mini, num_processes=2)
    started = []

    def launch(*args):
        Journal(tmp_path, 0).write('note', text='first')
        started.append(subprocess.Popen(['sleep', '100'], start_new_session=True))
        return started[0]

    monkeypatch.setattr('flowerdiff.services.launcher.launch_torchrun', launch)
    events = describe_distributed(ws, tmp_path, [])
    assert next(events)['text'] == 'first'
    assert started[0].poll() is None
    events.close()
    assert started[0].poll() == -signal.SIGTERM


def fail(*args, **kwargs):
    raise ZeroDivisionError


def test_a_process_leaves_when_the_stage_is_gone(mini, whole, tmp_path, monkeypatch):
    ws = make(tmp_path / 'ws', mini)
    dead = multiprocessing.get_context('fork').Process(target=int)
    dead.start()
    dead.join()
    pictures = largest_first(ws.pictures, list(captions_of(whole)))[0]
    write_json(tmp_path / 'job.json', dict(pid=dead.pid, pictures=pictures))
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    threads = torch.get_num_threads()
    assert run_worker(str(ws.root), str(tmp_path)) == 0
    assert len(read_journals(tmp_path)) == 4, 'after one batch'
    monkeypatch.setattr(Florence, 'answers', fail)
    with pytest.raises(ZeroDivisionError):
        run_worker(str(ws.root), str(tmp_path))
    error = json.loads((tmp_path / '1-2.jsonl').read_text())
    assert error['kind'] == 'ZeroDivisionError', 'the journal records the error'
    torch.set_num_threads(threads)


# ---- memory


def test_batches_are_halved_until_they_fit(mini, whole, tmp_path, monkeypatch, capsys):
    ws = make(tmp_path / 'ws', mini)
    change(ws, batch_size=16)
    sizes = []

    def small(self, inputs, task):
        sizes.append(len(inputs['pixel_values']))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return real_answers(self, inputs, task)

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(Florence, 'answers', small)
    run(ws.root)
    assert captions_of(ws) == captions_of(whole)
    assert [size for size in sizes if size > 2] == [16, 8, 4]
    assert [line for line in capsys.readouterr().out.splitlines() if 'memory' in line] == [
        'caption: 16 pictures at a time do not fit into memory, going on with 2'
    ]
    monkeypatch.setattr(Florence, 'answers', out_of_memory)
    with pytest.raises(UserError, match='one picture alone does not fit'):
        run(change(ws, max_new_tokens=7).root)
    monkeypatch.setattr(Florence, 'answers', fail)
    with pytest.raises(ZeroDivisionError):
        run(ws.root)  # any other error is not about memory


def test_memory_holds_two_batches(mini, whole, tmp_path, monkeypatch):
    ws = make(tmp_path / 'ws', mini)
    prepared = []

    def inputs(self, pictures, task):
        prepared.append(len(pictures))
        return real_inputs(self, pictures, task)

    monkeypatch.setattr(Florence, 'inputs', inputs)
    pictures = largest_first(ws.pictures, list(captions_of(whole)))[0]
    in_memory = [len(prepared) - i for i, _ in enumerate(describe_share(ws, tmp_path, pictures))]
    assert len(in_memory) == 7
    assert max(in_memory) <= 2


# ---- models that cannot be used


def update_config(folder, **changes):
    write_json(folder / 'config.json', read_json(folder / 'config.json') | changes)


def another_model(folder):
    write_json(folder / 'config.json', dict(model_type='blip'))


def first_format(folder):
    update_config(folder, auto_map={})


def pickled(folder):
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')


def truncated(folder):
    (folder / 'model.safetensors').write_bytes(b'12')


def without_processor(folder):
    (folder / 'processor_config.json').unlink()


def without_tokenizer(folder):
    (folder / 'tokenizer.json').unlink()


def another_shape(folder):
    text_config = read_json(folder / 'config.json')['text_config']
    update_config(folder, text_config=text_config | dict(decoder_layers=2))


@pytest.mark.parametrize(
    'damage,line',
    [
        (another_model, 'is a blip; caption.model wants a Florence-2'),
        (first_format, 'in its first format'),
        (pickled, 'convert it to safetensors'),
        (truncated, 'cannot be opened'),
        (without_processor, 'cannot be opened'),
        (without_tokenizer, 'its tokenizer is missing'),
        (another_shape, 'do not fit its config.json'),
        (shutil.rmtree, 'no such folder'),
    ],
)
def test_other_models_are_refused_in_a_line(mini, tmp_path, damage, line):
    model = Path(shutil.copytree(mini, tmp_path / 'model'))
    damage(model)
    ws = make(tmp_path / 'ws', model)
    with pytest.raises(UserError, match=line) as e:
        run(ws.root)
    assert '\n' not in str(e.value)
    assert not ws.captions.exists()


def test_the_hub_offline(mini, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    commit = '0123456789abcdef0123456789abcdef01234567'
    shutil.copytree(mini, tmp_path / 'hub' / 'models--someone--florence' / 'snapshots' / commit)
    ws = make(tmp_path / 'ws', f'someone/florence@{commit}')
    run(ws.root)
    message = r"someone/other@.* is not in this machine's cache and cannot be downloaded"
    with pytest.raises(UserError, match=message) as e:
        run(change(ws, model=f'someone/other@{commit}').root)
    assert '\n' not in str(e.value)
    assert len(captions_of(ws)) == 25, 'the earlier captions are kept'
    with pytest.raises(UserError, match=r'caption.model .*pinned to a commit'):
        change(ws, model='someone/florence')


def test_long_descriptions_get_short_captions_too():
    from flowerdiff.core.profiles import load_profile
    from flowerdiff.stages.caption import caption

    settings = load_profile('folder', {'caption.captioner': 'florence'}).caption
    row = dict(label='rose', sha256='1', answers={'<CAPTION>': 'a pink rose at the gate of a garden'})
    described = caption(row, settings)
    assert len(described.captions) == 3 and described.captioner == 'florence'
    assert min(len(text) for text in described.captions) < 25
    given = settings.model_copy(update=dict(captioner='given'))
    assert caption(row | dict(captions=['a pink rose']), given).captions == ['a pink rose']


def test_a_missing_picture(mini, tmp_path):
    ws = make(tmp_path / 'ws', mini)
    (ws.pictures / 'val' / '000001.png').unlink()
    with pytest.raises(UserError, match=r'val/000001.png: cannot be read .*run the stage prepare again'):
        run(ws.root)


# ---- sentences


@pytest.mark.parametrize(
    'answer,name,caption',
    [
        (
            'The image shows a close up of a pink flower with green leaves in the background.',
            'pink primrose',
            'a close up of a pink primrose with green leaves in the background',
        ),
        (
            'A yellow flower with green leaves on it.',
            'sunflower',
            'a yellow sunflower with green leaves on it',
        ),
        ('A yellow flower with green leaves on it.', '', 'a yellow flower with green leaves on it'),
        (
            'In this image we can see two cars on the road. In the background, we can also see '
            'water, hills and the sky.',
            '',
            'two cars on the road',
        ),
        (
            'The image shows a blue Volkswagen Beetle parked in front of a yellow building with two brown '
            'doors, surrounded by trees and a clear blue sky.',
            '',
            'a blue Volkswagen Beetle parked in front of a yellow building with two brown doors, '
            'surrounded by trees and a clear blue sky',
        ),
        (
            'The image shows a close up of a tree branch with green leaves against a blurred background. '
            'The leaves are a vibrant green color.',
            'magnolia',
            'a magnolia, a close up of a tree branch with green leaves against a blurred background',
        ),
        (
            'In this image, there is a plant which has flowers and leaves.',
            'azalea',
            'an azalea, a plant which has flowers and leaves',
        ),
        (
            'A purple and white flower is in the grass.',
            'spring crocus',
            'a purple and white spring crocus is in the grass',
        ),
        (
            'A bunch of red flowers that are in the grass.',
            'tiger lily',
            'a bunch of red tiger lilies that are in the grass',
        ),
        (
            'There is a flower in the center of the image. The background is blurred.',
            'iris',
            'an iris in the center of the image',
        ),
        ('Two white daisies in the grass.', 'oxeye daisy', 'two white oxeye daisies in the grass'),
        ('The image contains a purple flower.', 'canterbury bells', 'purple canterbury bells'),
        ('In the center of the image there is an orange flower.', 'orange dahlia', 'an orange dahlia'),
        ('This is a picture of a flower pot on a table.', 'rose', 'a rose, a flower pot on a table'),
        ('A woman with a flower in her hair.', 'rose', 'a rose, a woman with a flower in her hair'),
        ('The image shows Sunflowers in a field.', 'sunflower', 'sunflowers in a field'),
        ('<pad>A primrose</s>', 'rose', 'a rose, a primrose'),
    ],
)
def test_sentences(answer, name, caption):
    assert clean_caption(answer, name) == caption


def test_a_paragraph_is_kept_up_to_its_last_whole_sentence():
    answer = (
        'The image is a close-up of a white flower. The flower has five petals. In the background there is'
    )
    assert (
        clean_caption(answer, 'iris', whole=True) == 'a close-up of a white iris. the flower has five petals'
    )
    assert (
        clean_caption(answer, 'iris') == 'a close-up of a white iris'
        and clean_caption('A flower', 'iris') == 'an iris'
    )
