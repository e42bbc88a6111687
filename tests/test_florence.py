"Captions by Florence-2, through the stage, with a miniature of its classes: batches, kills, processes, memory, other models."

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
import pytest
from PIL import Image

torch = pytest.importorskip('torch')
import psutil
from tiny import tiny_florence

from flowerdiff.core.schema import UserError
from flowerdiff.core.workspace import open_workspace, read_json, read_jsonl, write_json, write_jsonl
from flowerdiff.data.caption_cleanup import clean_caption, mention
from flowerdiff.data.captioning import (
    describe_share,
    describe_distributed,
    largest_first,
    read_journals,
    run_worker,
)
from flowerdiff.models.florence import Florence, open_florence
from flowerdiff.services.launcher import Journal
from flowerdiff.stages.caption import run

LABELS = 'oxeye daisy', 'iris', 'canterbury bells', ''
answers, inputs = Florence.answers, Florence.inputs


@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    return tiny_florence(tmp_path_factory.mktemp('mini') / 'florence')


def make(root, mini, **settings):
    "25 pictures of three sizes as the stage prepare leaves them; every fourth has no label, the first of each split has a caption of its own."
    ws = open_workspace(
        root,
        'folder',
        {
            f'caption.{k}': v
            for k, v in dict(
                captioner='florence',
                model=str(mini),
                batch_size=4,
                num_beams=1,
                max_new_tokens=16,
                **settings,
            ).items()
        },
    )
    rng, counts = np.random.default_rng(0), dict(train=20, val=3, test=2)
    for split, k in counts.items():
        (ws.pictures / split).mkdir(parents=True)
        for i in range(k):
            Image.fromarray(
                np.kron(
                    rng.integers(0, 255, (4, 4, 3), np.uint8),
                    np.ones((8 * (1 + i % 3),) * 2 + (1,), np.uint8),
                )
            ).save(ws.pictures / split / f'{i:06}.png')
        write_jsonl(
            ws.pictures / split / 'metadata.jsonl',
            [
                dict(file_name=f'{i:06}.png', sha256=f'{split}{i}', label=LABELS[i % 4])
                | (dict(captions=['its own']) if not i else {})
                for i in range(k)
            ],
        )
    write_json(ws.pictures / 'info.json', dict(counts=counts))
    return ws


def change(ws, **settings):
    return open_workspace(ws.root, None, {f'caption.{k}': v for k, v in settings.items()})


def said(ws):
    return {
        r['file_name']: (r['captions'], r['captioner']) for r in read_jsonl(ws.captions / 'metadata.jsonl')
    }


def label(file):
    return LABELS[int(Path(file).stem) % 4]


def batches(folder):
    return [
        list(e['answers'])
        for p in sorted(folder.glob('caption-*/*-*.jsonl'))
        for l in p.read_text().split('\n')[:-1]
        if (e := json.loads(l))['event'] == 'batch'
    ]


@pytest.fixture
def asked(monkeypatch):  # how many pictures were asked about, a number each time
    sizes = []
    monkeypatch.setattr(
        Florence,
        'answers',
        lambda self, x, task: sizes.append(len(x['pixel_values'])) or answers(self, x, task),
    )
    return sizes


@pytest.fixture(scope='module')
def whole(mini, tmp_path_factory):
    ws = make(tmp_path_factory.mktemp('whole') / 'ws', mini)
    (ws.root.parent / 'summary.txt').write_text(run(ws.root).summary)
    return ws


# ---- what is said


def test_every_picture_is_described_under_its_name(whole):
    captions = said(whole)
    assert len(captions) == 25 and {c for _, c in captions.values()} == {'florence'}
    for f, ([text], _) in captions.items():
        assert (
            text == text.strip(' .') and '<' not in text and (not label(f) or mention(label(f)).search(text))
        ), text
    assert len({t for [t], _ in captions.values()}) > 15, 'pictures differ and so do their captions'
    raw = {k: a for (_, k), a in read_journals(next(whole.work.glob('caption-*'))).items()}
    assert len(raw) == 25 and not any(mention('oxeye daisy').search(a) for a in raw.values()), (
        'the journal keeps what the model said'
    )
    assert 'florence' in (s := (whole.root.parent / 'summary.txt').read_text()) and 'pictures/s' in s


def test_largest_pictures_first(whole):
    pictures, _keys = largest_first(whole.pictures, list(said(whole)))
    assert [k for b in batches(whole.work) for k in b] == [k for k, _ in pictures]
    sides = [Image.open(whole.pictures / f).width for _, f in pictures]
    assert sides == sorted(sides, reverse=True) and len(set(sides)) == 3


@pytest.mark.parametrize('beams', [1, 3])
def test_alone_as_in_a_batch(mini, whole, beams):
    florence = open_florence(mini, num_beams=beams, max_new_tokens=16)
    pictures = [Image.open(whole.pictures / f) for f in said(whole)]
    for task in ('<CAPTION>', '<DETAILED_CAPTION>'):
        together = florence.describe(pictures, task)
        assert together == [florence.describe([p], task)[0] for p in pictures] and not any(
            '<' in t for t in together
        )
        assert len({len(t.split()) for t in together}) > 1, (
            'the miniature says long and short ones, and the short are padded in a batch'
        )
        if beams > 1:
            assert together != open_florence(mini, num_beams=1, max_new_tokens=16).describe(pictures, task)


def test_several_prompts_and_a_grown_collection_ask_for_what_is_new(mini, tmp_path, asked):
    ws = make(tmp_path / 'ws', mini)
    run(ws.root)
    first = said(ws)
    assert sum(asked) == 25
    run(change(ws, prompts=['<CAPTION>', '<DETAILED_CAPTION>']).root)
    assert sum(asked) == 50 and all(
        t[0][-1] == first[f][0][0] and len(t[0]) == 2 for f, t in said(ws).items()
    )
    shutil.copy(
        ws.pictures / 'val' / '000000.png', ws.pictures / 'train' / '000020.png'
    )  # known under another name
    Image.new('RGB', (16, 16), 'red').save(ws.pictures / 'train' / '000021.png')
    write_jsonl(
        ws.pictures / 'train' / 'metadata.jsonl',
        read_jsonl(ws.pictures / 'train' / 'metadata.jsonl')
        + [dict(file_name=f'{i:06}.png', label='') for i in (20, 21)],
    )
    run(ws.root)
    assert sum(asked) == 52 and len(said(ws)) == 27
    assert 'pictures/s' not in run(ws.root).summary and sum(asked) == 52
    run(change(ws, prompts=['<CAPTION>'], max_new_tokens=5).root)
    assert sum(asked) == 52 + 26, 'other settings, other answers'


def test_given_captions_win_unless_florence_is_asked_for(mini, whole, tmp_path):
    ws = make(tmp_path / 'ws', tmp_path / 'no model here')
    run(change(ws, captioner='auto').root)
    captions = said(ws)
    assert (
        captions['train/000000.png'] == (['its own'], 'given') and captions['train/000001.png'][1] == 'labels'
    )
    assert said(whole)['train/000000.png'][1] == 'florence'


def test_no_answer_leaves_the_picture_to_the_next_captioner(mini, tmp_path, monkeypatch):
    ws = make(tmp_path / 'ws', mini)
    monkeypatch.setattr(Florence, 'answers', lambda self, x, task: ['</s>'] * len(x['pixel_values']))
    with pytest.raises(UserError, match='is florence, but no picture has'):
        run(ws.root)
    assert not ws.captions.exists()
    monkeypatch.setattr(
        Florence, 'answers', lambda self, x, task: ['A flower.'] + [''] * (len(x['pixel_values']) - 1)
    )
    summary = run(change(ws, max_new_tokens=9).root).summary
    by = {f: c for f, (_, c) in said(ws).items()}
    assert set(by.values()) == {'florence', 'given', 'labels', 'nothing'} and 'florence 7' in summary
    assert all(
        by[f] in ('florence', 'given' if f.endswith('000000.png') else 'labels' if label(f) else 'nothing')
        for f in by
    )


# ---- killed, and several at once


def slow_run(root, calls):
    "The stage, telling of every batch before it is asked about."

    def slow(self, x, task):
        with open(calls, 'a') as f:
            f.write(f'{len(x["pixel_values"])}\n')
        time.sleep(0.04)
        return answers(self, x, task)

    Florence.answers = slow
    run(root)


def start(root, calls):
    os.environ['PYTHONPATH'] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get('PYTHONPATH')])]
    )
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['test_florence'])
    p = context.Process(target=slow_run, args=(str(root), str(calls)))
    p.start()
    return p


def test_killed_at_random_points_it_redoes_a_batch_at_most(mini, whole, tmp_path):
    ws, calls, luck, kills = make(tmp_path / 'ws', mini), tmp_path / 'calls', random.Random(0), 3
    calls.write_text('')
    told = lambda: list(map(int, calls.read_text().split()))
    for _ in range(kills):
        p, before, wait = start(ws.root, calls), len(told()), luck.randint(1, 2)
        end = time.time() + 100
        while len(told()) < before + wait and p.exitcode is None and time.time() < end:
            time.sleep(0.005)
        time.sleep(luck.uniform(0, 0.05))
        p.kill()
        p.join()
        assert p.exitcode == -signal.SIGKILL and not ws.captions.exists()
    with open(sorted(ws.work.glob('caption-*/*-*.jsonl'))[-1], 'a') as f:
        f.write('{"event": "batch", "task": "<DETAILED_CAPTION>", "answ')  # a line that a kill cut
    p = start(ws.root, calls)
    p.join()
    assert p.exitcode == 0 and said(ws) == said(whole)
    assert 25 <= sum(told()) <= 25 + 4 * kills, 'at most one batch a kill is asked about again'
    keys = [k for b in batches(ws.work) for k in b]
    assert len(set(keys)) == 25 <= len(keys) == 25, 'none is written twice'


def kill_rank(rank, done):  # as soon as it is there
    while not done.is_set():
        for p in psutil.Process().children(recursive=True):
            try:
                if (
                    'flowerdiff.data.captioning' in p.cmdline()
                    and 'torch.distributed.run' not in p.cmdline()
                    and p.environ().get('RANK') == rank
                ):
                    p.kill()
                    return
            except psutil.Error:
                pass
        time.sleep(0.02)


def test_two_processes_say_what_one_says_and_a_dead_one_is_told_of(mini, whole, tmp_path, asked):
    ws = make(tmp_path / 'ws', mini, num_processes=2)
    folder = ws.work / next(whole.work.glob('caption-*')).name
    folder.mkdir(parents=True)
    (folder / '0-0.jsonl').write_text(
        ''.join(open(next(whole.work.glob('caption-*/0-0.jsonl'))).readlines()[:2])
    )  # two batches of an earlier run
    done = threading.Event()
    killer = threading.Thread(target=kill_rank, args=('1', done))
    killer.start()
    try:
        with pytest.raises(UserError, match='a process was killed.*run again to go on') as e:
            run(ws.root)
    finally:
        done.set()
        killer.join()
    assert '\n' not in str(e.value) and not ws.captions.exists() and len(read_journals(folder)) >= 8
    known = {k for _, k in read_journals(folder)}
    summary = run(ws.root).summary
    assert said(ws) == said(whole) and 'pictures/s' in summary and not asked, 'the stage itself asks nothing'
    after = [
        (p.name[0], k)
        for p in folder.glob('*-*.jsonl')
        for l in p.read_text().splitlines()
        if (e := json.loads(l))['event'] == 'batch'
        for k in e['answers']
        if k not in known
    ]
    assert {r for r, _ in after} == {'0', '1'} and len({k for _, k in after}) == len(after) == 25 - len(
        known
    ), 'each did its share and none twice'


def test_an_interrupted_stage_ends_its_processes(mini, tmp_path, monkeypatch):
    ws, started = make(tmp_path / 'ws', mini, num_processes=2), []

    def launch(*args):
        Journal(tmp_path, 0).write('note', text='first')
        started.append(subprocess.Popen(['sleep', '100'], start_new_session=True))
        return started[0]

    monkeypatch.setattr('flowerdiff.services.launcher.launch_torchrun', launch)
    events = describe_distributed(ws, tmp_path, [])
    assert next(events)['text'] == 'first' and started[0].poll() is None
    events.close()
    assert started[0].poll() == -signal.SIGTERM


def test_a_process_leaves_when_the_stage_is_gone(mini, whole, tmp_path, monkeypatch):
    ws = make(tmp_path / 'ws', mini)
    dead = multiprocessing.get_context('fork').Process(target=int)
    dead.start()
    dead.join()
    write_json(
        tmp_path / 'job.json', dict(pid=dead.pid, pictures=largest_first(ws.pictures, list(said(whole)))[0])
    )
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    threads = torch.get_num_threads()
    assert run_worker(str(ws.root), str(tmp_path)) == 0 and len(read_journals(tmp_path)) == 4, (
        'after one batch'
    )
    monkeypatch.setattr(Florence, 'answers', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_worker(str(ws.root), str(tmp_path))
    assert json.loads((tmp_path / '1-2.jsonl').read_text())['kind'] == 'ZeroDivisionError', (
        'what it died of is in its journal'
    )
    torch.set_num_threads(threads)


# ---- memory


def test_batches_are_halved_until_they_fit(mini, whole, tmp_path, monkeypatch, capsys):
    ws, seen = make(tmp_path / 'ws', mini), []
    change(ws, batch_size=16)

    def small(self, x, task):
        seen.append(len(x['pixel_values']))
        if seen[-1] > 3:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return answers(self, x, task)

    monkeypatch.setattr(Florence, 'answers', small)
    run(ws.root)
    assert said(ws) == said(whole) and [s for s in seen if s > 2] == [16, 8, 4]
    assert [l for l in capsys.readouterr().out.splitlines() if 'memory' in l] == [
        'caption: 16 pictures at a time do not fit into memory, going on with 2'
    ]
    monkeypatch.setattr(
        Florence, 'answers', lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError('CUDA out of memory'))
    )
    with pytest.raises(UserError, match='one picture alone does not fit'):
        run(change(ws, max_new_tokens=7).root)
    monkeypatch.setattr(Florence, 'answers', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(ws.root)  # another error is not memory's


def test_memory_holds_two_batches(mini, whole, tmp_path, monkeypatch):
    ws, alive = make(tmp_path / 'ws', mini), []
    monkeypatch.setattr(
        Florence, 'inputs', lambda self, p, task: alive.append(len(p)) or inputs(self, p, task)
    )
    most = []
    for i, e in enumerate(describe_share(ws, tmp_path, largest_first(ws.pictures, list(said(whole)))[0])):
        most.append(len(alive) - i)
    assert len(most) == 7 and max(most) <= 2


# ---- what can not be used


def broken(mini, folder, how):
    shutil.copytree(mini, folder)
    how(folder)
    return folder


@pytest.mark.parametrize(
    'how,line',
    [
        (
            lambda f: write_json(f / 'config.json', dict(model_type='blip')),
            'is a blip; caption.model wants a Florence-2',
        ),
        (
            lambda f: write_json(f / 'config.json', read_json(f / 'config.json') | dict(auto_map={})),
            'in its first format',
        ),
        (lambda f: (f / 'model.safetensors').rename(f / 'pytorch_model.bin'), 'convert it to safetensors'),
        (lambda f: (f / 'model.safetensors').write_bytes(b'12'), 'cannot be opened'),
        (lambda f: (f / 'processor_config.json').unlink(), 'cannot be opened'),
        (lambda f: (f / 'tokenizer.json').unlink(), 'its tokenizer is missing'),
        (
            lambda f: write_json(
                f / 'config.json',
                (c := read_json(f / 'config.json'))
                | dict(text_config=c['text_config'] | dict(decoder_layers=2)),
            ),
            'do not fit its config.json',
        ),
        (shutil.rmtree, 'no such folder'),
    ],
    ids=['kind', 'first format', 'pickle', 'cut', 'no processor', 'no tokenizer', 'misfit', 'gone'],
)
def test_other_models_are_refused_in_a_line(mini, tmp_path, how, line):
    ws = make(tmp_path / 'ws', broken(mini, tmp_path / 'model', how))
    with pytest.raises(UserError, match=line) as e:
        run(ws.root)
    assert '\n' not in str(e.value) and not ws.captions.exists()


def test_the_hub_off_line(mini, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    commit = '0123456789abcdef0123456789abcdef01234567'
    shutil.copytree(mini, tmp_path / 'hub' / 'models--someone--florence' / 'snapshots' / commit)
    ws = make(tmp_path / 'ws', f'someone/florence@{commit}')
    run(ws.root)
    with pytest.raises(
        UserError, match="someone/other@.* is not in this machine's cache and cannot be downloaded"
    ) as e:
        run(change(ws, model=f'someone/other@{commit}').root)
    assert '\n' not in str(e.value) and len(said(ws)) == 25, 'what was there stays'
    with pytest.raises(UserError, match='caption.model .*pinned to a commit'):
        change(ws, model='someone/florence')


def test_a_picture_that_is_gone(mini, tmp_path):
    ws = make(tmp_path / 'ws', mini)
    (ws.pictures / 'val' / '000001.png').unlink()
    with pytest.raises(UserError, match='val/000001.png: is not there'):
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
            'In this image we can see two cars on the road. In the background, we can also see water, hills and the sky.',
            '',
            'two cars on the road',
        ),
        (
            'The image shows a blue Volkswagen Beetle parked in front of a yellow building with two brown doors, surrounded by trees and a clear blue sky.',
            '',
            'a blue Volkswagen Beetle parked in front of a yellow building with two brown doors, surrounded by trees and a clear blue sky',
        ),
        (
            'The image shows a close up of a tree branch with green leaves against a blurred background. The leaves are a vibrant green color.',
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
