# ruff: noqa: F811 (fixtures are imported)
"""Training under faults: a run that failed and was started again gives the result of an undisturbed run.

FLOWERDIFF_KILLS: how many kills at random moments (20).
"""

import os
import random
import shutil
import signal
import time
from typing import NamedTuple

import numpy as np
import pytest
from test_train import events, last_checkpoint, parts, same_result, send_signal, toy, trained  # noqa: F401
from train_worker import start

from flowerdiff.core.workspace import Workspace

KILLS = int(os.environ.get('FLOWERDIFF_KILLS', 20))
DENSE = dict(
    train__checkpoint_minutes=1e-5, train__keep_checkpoints=2
)  # a checkpoint as soon as the one before is written


class Undisturbed(NamedTuple):
    "A run without faults."

    ws: Workspace
    folder_name: str
    seconds: float  # of training


def run_folder(ws):
    from flowerdiff.training.worker import run_fingerprint

    return ws.work_dir('train', run_fingerprint(ws))


@pytest.fixture(scope='module')
def whole(toy):
    "Train a run without faults."
    ws = toy('whole', **DENSE)
    folder = run_folder(ws)
    p = start(ws.root, folder)
    p.join()
    assert p.exitcode == 0
    times = {e['event']: e['time'] for e in events(ws)}
    return Undisturbed(ws, folder.name, times['done'] - times['start'])


def steps(ws):
    return [(e['step'], e['loss'], e['lr'], e['grad_norm']) for e in events(ws) if e['event'] == 'step']


def last_reported(ws):
    return max((e['step'] for e in events(ws) if e['event'] == 'checkpoint'), default=0)


def starts(ws):
    return [e['resumed_from'] for e in events(ws) if e['event'] == 'start']


class FaultyRun:
    "Runs of one workspace, one after the other. None may go back behind a checkpoint that was reported."

    def __init__(self, toy, whole, **settings):
        self.whole = whole.ws
        self.ws = toy('run', **DENSE | settings)
        self.folder = self.ws.work / whole.folder_name
        self.folder.mkdir(parents=True)

    def begin(self, *fault):
        self.known = last_reported(self.ws)  # the newest checkpoint before this start
        self.begun = len(starts(self.ws))
        return start(self.ws.root, self.folder, fault)

    def end(self, p, timeout=120):
        "Wait for the process and return its exit code."
        p.join(timeout)
        assert p.exitcode is not None
        for at in starts(self.ws)[self.begun :]:
            assert at >= self.known, f'went back to step {at}, behind the reported {self.known}'
        return p.exitcode

    def same(self):
        "Assert that the run is finished and equals the undisturbed one."
        same_result(self.ws, self.whole)
        assert set(steps(self.ws)) == set(steps(self.whole))  # a step that was made twice was the same twice


def killed_at_random(run, rng, seconds):
    "Kill one process at a random moment. Return False if it was done before."
    p = run.begin()
    if rng.random() < 0.8:  # while it trains, rather than while it starts
        while len(starts(run.ws)) == run.begun and p.is_alive():
            time.sleep(0.005)
    p.join(rng.uniform(0, seconds))
    alive = p.is_alive()
    if alive:
        p.kill()
    return run.end(p) == -signal.SIGKILL


def test_killed_at_random_moments(toy, whole):
    rng, kills = random.Random(KILLS), 0
    while kills < KILLS:
        run = FaultyRun(toy, whole)
        while kills < KILLS and killed_at_random(run, rng, whole.seconds):
            kills += 1
        assert run.end(run.begin()) == 0
        run.same()
        shutil.rmtree(run.ws.root)


def test_killed_at_every_change_of_the_disk(toy, whole):
    """Kill before, after and within every disk operation of a checkpoint.

    Sixty operations are the first checkpoint that a process writes and a good part of the second.
    """
    run = FaultyRun(toy, whole, train__keep_checkpoints=1)
    for k in range(1, 61):
        while (code := run.end(run.begin('kill', k))) == 0:
            run.same()
            shutil.rmtree(run.ws.root)
            run = FaultyRun(toy, whole, train__keep_checkpoints=1)
        assert code == -signal.SIGKILL
    assert run.end(run.begin()) == 0
    run.same()


def test_killed_within_a_file_of_tensors(toy, whole):
    run = FaultyRun(toy, whole)
    files = {
        f.stem: f.stat().st_size
        for f in (whole.ws.work / whole.folder_name / 'checkpoints').glob('*24/*.safetensors')
    }
    for size in (files['weights'] // 2, files['weights'] - 1, files['weights'] + 1, files['optimizer'] - 1):
        assert run.end(run.begin('size', size)) == -signal.SIGXFSZ
    assert last_reported(run.ws) == 0 and run.end(run.begin()) == 0
    run.same()


def test_the_disk_is_full_now_and_then(toy, whole):
    "A checkpoint that does not fit on the disk becomes a note. Training continues."
    run = FaultyRun(toy, whole)
    assert run.end(run.begin('full', 37)) == 0
    notes = [e['text'] for e in events(run.ws) if e['event'] == 'note']
    assert (
        notes
        and all('was not written' in n and 'No space left on device' in n for n in notes)
        and last_reported(run.ws) > 0
    )
    assert trained(run.ws)['validation'] == trained(whole.ws)['validation']
    assert run.end(run.begin()) == 0
    run.same()


def test_sigterm_on_a_full_disk(toy, whole):
    "If nothing can be saved, the run records it and exits. The next start continues where it can."
    run = FaultyRun(toy, whole)
    p = run.begin('full', 1)
    while not steps(run.ws):
        time.sleep(0.01)
    assert send_signal(p, signal.SIGTERM) == 75 and last_reported(run.ws) == 0
    assert not list((run.folder / 'checkpoints').glob('*')) and [e['event'] for e in events(run.ws)][-2:] == [
        'note',
        'stopped',
    ]
    assert run.end(run.begin()) == 0
    run.same()


@pytest.fixture(scope='module')
def halfway(toy, whole):
    run = FaultyRun(toy, whole)
    p = run.begin()
    while last_reported(run.ws) < 8:
        time.sleep(0.005)
    p.kill()
    run.end(p)
    return run


def flip(f):
    data = bytearray(f.read_bytes())
    i = random.randrange(len(data))
    data[i] ^= 1 << random.randrange(8)
    f.write_bytes(data)


def cut(f):
    f.write_bytes(f.read_bytes()[: random.randrange(f.stat().st_size)])


@pytest.mark.parametrize(
    'name', ['weights.safetensors', 'ema.safetensors', 'optimizer.safetensors', 'state.json']
)
def test_damaged(toy, whole, halfway, name):
    "A damaged or missing file is reported, and the run continues from the checkpoint before."
    from flowerdiff.training.checkpoints import checkpoints, load_checkpoint

    random.seed(name)
    run = FaultyRun(toy, whole)
    messages = []
    newest, before = (int(p.name) for p in checkpoints(halfway.folder / 'checkpoints')[:2])
    for harm in (*[flip] * 20, *[cut] * 5, os.unlink):
        shutil.rmtree(run.folder / 'checkpoints', ignore_errors=True)
        shutil.copytree(halfway.folder / 'checkpoints', run.folder / 'checkpoints')
        harm(run.folder / 'checkpoints' / f'{newest:08d}' / name)
        assert load_checkpoint(run.folder / 'checkpoints', messages.append).state['step'] == before
        assert name in messages[-1] and f'{newest:08d}' in messages[-1]
    assert run.end(run.begin()) == 0 and starts(run.ws) == [before]
    assert any(name in e['text'] for e in events(run.ws) if e['event'] == 'note')
    same_result(run.ws, whole.ws)


def test_stopped_on_the_step_of_a_validation(toy, whole):
    "The stop comes first. The validation that was due is done by the next start."
    run = FaultyRun(toy, whole, train__checkpoint_minutes=60.0)
    assert [run.end(run.begin('stop', 6)) for _ in range(4)] == [75, 75, 75, 0] and starts(run.ws) == [
        0,
        6,
        12,
        18,
    ]
    run.same()


# ---- guards


def amplify(ws, picture, factor=3000):
    "Multiply the latents of a picture."
    from flowerdiff.data.shards import Shards, ShardWriter

    latents = {k: np.array(v) for k, v in Shards(ws.encoded / 'train', 'latents').load().items()}
    latents['mean'][picture] *= factor
    for f in (ws.encoded / 'train').glob('latents*'):
        f.unlink()
    with ShardWriter(
        ws.encoded / 'train', 'latents', {k: (v.shape[1:], str(v.dtype)) for k, v in latents.items()}
    ) as w:
        w.append(**latents)


def test_a_spike_is_skipped_and_reported_and_the_run_resumes_across_it(toy):
    from flowerdiff.data.batches import batch_indices

    one, two = (toy(name, **DENSE) for name in ('one', 'two'))
    for ws in (one, two):
        amplify(ws, 5)
    p = start(one.root)
    p.join()
    assert p.exitcode == 0
    spikes = [e for e in events(one) if e['event'] == 'spike']
    due = [
        s + 1 for s in range(12, 24) if 5 in batch_indices(s, 8, 64, 0)
    ]  # two of warm-up, ten to know what is usual
    assert (
        due
        and [e['step'] for e in spikes] == due
        and all('train/000005.png' in e['pictures'] for e in spikes)
    ), (spikes, due)
    assert last_checkpoint(one)[1]['updates'] == 24 - len(due)
    for upto in (due[0], due[-1]):
        p = start(two.root)
        while last_reported(two) < upto and p.is_alive():
            time.sleep(0.002)
        p.kill()
        p.join()
    p = start(two.root)
    p.join()
    assert p.exitcode == 0
    same_result(two, one)


def test_a_loss_that_is_not_a_number_keeps_the_last_good_checkpoint(toy):
    from flowerdiff.data.batches import batch_indices

    ws = toy(**DENSE)
    first = next(s for s in range(24) if 5 in batch_indices(s, 8, 64, 0))
    amplify(ws, 5, float('nan'))
    p = start(ws.root)
    p.join()
    assert p.exitcode == 2
    failed = events(ws)[-1]
    assert (
        failed['event'] == 'failed'
        and f'not a number at step {first + 1} (pictures train/000005.png)' in failed['message']
    )
    assert last_reported(ws) <= first and (not first or last_checkpoint(ws)[1]['step'] == last_reported(ws))


def test_suggested_settings_fit_into_memory(toy):
    from flowerdiff.core.workspace import open_workspace

    def attempt(mb):
        p = start(ws.root, '', ('memory', mb))
        p.join()
        return p.exitcode

    ws = toy(train__batch_size=2048, train__epochs=0.01)
    assert attempt(800) == 2 and attempt(350) == 2
    message = events(ws)[-1]['message']
    print(message)
    assert (
        'not enough memory at step 1 with train.batch_size: 2048; train.batch_size: ' in message
        and message.endswith('would fit')
    )
    fits = int(message.split('; train.batch_size: ')[1].split()[0])
    assert 64 <= fits < 2048
    ws = open_workspace(ws.root, overrides={'train.batch_size': fits})
    assert attempt(800) == 0  # a thread reserves addresses, which this limit counts, though no memory
