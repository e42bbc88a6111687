"Training and promotion with real processes: signals, kills, resumes, two ranks, the gate."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flowerdiff.selftest.training_parts import MINIATURE

sys.path.insert(0, str(Path(__file__).parent))
QUICK = MINIATURE | {
    'train.channels': [16, 32],
    'train.batch_size': 8,
    'train.epochs': 3,
    'train.lr': 2e-3,
    'train.threads': 1,
    'train.precision': 'fp32',
    'train.samples_every': 1000,
    'train.validate_every': 6,
    'tracking.enabled': False,
}


@pytest.fixture(scope='session')
def parts(tmp_path_factory):
    from tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp('parts'))


def make_encoded(root, parts, n=64, shuffled=False):
    "Write what encode writes, for a toy data set whose texts give the brightness."
    from flowerdiff.core.files import write_json
    from flowerdiff.data.batches import toy_split
    from flowerdiff.data.shards import ShardWriter

    encoded, width = root / 'encoded', 32
    for split, count in (('train', n), ('val', 16)):
        toy = toy_split(count, width=width)
        with ShardWriter(
            encoded / split, 'latents', dict(mean=((2, 4, 8, 8), 'float16'), std=((2, 4, 8, 8), 'float16'))
        ) as w:
            w.append(mean=toy.mean.numpy(), std=toy.std.numpy())
        captions = toy.captions if not shuffled else [[1 + i // 2 % 2] for i in range(count)]
        write_json(encoded / split / 'captions.json', captions)
        write_json(encoded / split / 'files.json', [f'{split}/{i:06d}.png' for i in range(count)])
    texts = toy_split(64, width=width).texts.numpy()
    with ShardWriter(encoded / 'text', 'text', dict(embedding=(texts.shape[1:], 'float16'))) as w:
        w.append(embedding=texts)
    for part in ('vae', 'text_encoder', 'tokenizer'):
        shutil.copytree(parts / part, encoded / 'components' / part)
    write_json(encoded / 'manifest.json', dict(fingerprint=f'toy {n} {shuffled}'))


@pytest.fixture(scope='module')
def toy(tmp_path_factory, parts):
    "A workspace ready for training."
    from flowerdiff.core.workspace import open_workspace

    def make(name='toy', n=64, shuffled=False, **settings):
        ws = open_workspace(
            tmp_path_factory.mktemp('w') / name,
            'garden',
            QUICK | {k.replace('__', '.'): v for k, v in settings.items()},
        )
        make_encoded(ws.root, parts, n, shuffled)
        return ws

    return make


ENV = dict(os.environ, OMP_NUM_THREADS='1', DVC_NO_ANALYTICS='1')


def worker(ws, wait=None, timeout=300, **env):
    "Start the training process without torchrun. Wait for its end, or until `wait(events)` is true."
    from train_worker import start

    p = start(ws.root, OMP_NUM_THREADS='1', **env)
    if wait:
        end = time.time() + timeout
        while not wait(events(ws)):
            assert p.is_alive() and time.time() < end, events(ws)[-1:]
            time.sleep(0.01)
        return p
    p.join(timeout)
    return p


def send_signal(p, number, timeout=90):
    "Send a signal to a process and return its exit code."
    os.kill(p.pid, number)
    p.join(timeout)
    return p.exitcode


def events(ws):
    from flowerdiff.services.tracking import read_events

    return [e for f in ws.work.glob('train-*/events.jsonl') for e in read_events(f)[0]]


def weights(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()
    }


def trained(ws):
    return json.loads((ws.root / 'train.json').read_text())


def last_checkpoint(ws):
    from flowerdiff.training.checkpoints import load_checkpoint

    return load_checkpoint(next(ws.work.glob('train-*')) / 'checkpoints')


# ---- learning


def test_learns_what_its_captions_say(toy):
    "Captions that describe the pictures lower the loss; shuffled captions do not."
    described = toy('described', train__epochs=16)
    shuffled = toy('shuffled', shuffled=True, train__epochs=16)
    for ws in (described, shuffled):
        assert worker(ws).exitcode == 0
    # in strong noise only the text helps (the last level is noise alone)
    last, last_shuffled = (trained(ws)['validation']['by_level'][-2] for ws in (described, shuffled))
    assert last < 0.6 * last_shuffled, (last, last_shuffled)
    curve = [loss for _, loss in trained(described)['loss_curve']]
    assert np.mean(curve[-10:]) < 0.5 * np.mean(curve[:5])
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(described.candidate / 'unet')
    assert all(
        float(p.detach().abs().max()) > 0 for n, p in unet.named_parameters() if n.endswith('weight')
    ), 'an average that starts from zero would leave zeros'
    assert (described.candidate / 'model_index.json').is_file()
    recorded = json.loads((described.candidate / 'train_settings.json').read_text())
    assert sorted(recorded) == ['checksums', 'data', 'run_id', 'seed', 'train']


def test_stock_diffusers_opens_the_candidate(toy):
    from diffusers import DiffusionPipeline

    ws = toy(train__epochs=0.2)
    assert worker(ws).exitcode == 0
    pipe = DiffusionPipeline.from_pretrained(ws.candidate)
    picture = pipe('a rose', num_inference_steps=2, output_type='np').images
    assert np.isfinite(picture).all()
    assert pipe.scheduler.config.prediction_type == 'v_prediction' and pipe.scheduler.config.beta_end == 0.012


# ---- stopping


@pytest.fixture(scope='module')
def uninterrupted(toy):
    ws = toy('whole')
    assert worker(ws).exitcode == 0
    return ws


def same_result(a, b):
    (ga, sa), (gb, sb) = last_checkpoint(a), last_checkpoint(b)
    for group in ('weights', 'ema', 'optimizer'):
        for k, v in ga[group].items():
            assert (v == gb[group][k]).all(), (group, k)
    assert sa['files'] == sb['files']  # their checksums: bit for bit
    for k in ('step', 'losses', 'updates', 'validations', 'sums', 'norms', 'spikes', 'overflows', 'scaler'):
        assert sa[k] == sb[k], k
    assert (a.candidate / 'unet' / 'diffusion_pytorch_model.safetensors').read_bytes() == (
        b.candidate / 'unet' / 'diffusion_pytorch_model.safetensors'
    ).read_bytes()
    ta, tb = trained(a), trained(b)
    assert (
        ta['validation'] == tb['validation']
        and ta['loss_curve'] == tb['loss_curve']
        and ta['validation_curve'] == tb['validation_curve']
    )


def test_killed_and_started_again_is_the_same_run(toy, uninterrupted):
    "After two SIGKILLs, the result is that of the uninterrupted run, bit for bit."
    ws = toy('killed', train__checkpoint_minutes=1e-4)  # a checkpoint after every step
    for upto in (5, 14):
        p = worker(
            ws, wait=lambda es, upto=upto: any(e['event'] == 'checkpoint' and e['step'] >= upto for e in es)
        )
        send_signal(p, signal.SIGKILL)
    assert worker(ws).exitcode == 0
    starts = [e['resumed_from'] for e in events(ws) if e['event'] == 'start']
    assert len(starts) == 3 and starts[0] == 0 and 5 <= starts[1] < starts[2], starts
    same_result(ws, uninterrupted)


def test_sigterm_leaves_a_checkpoint_and_75(toy, uninterrupted):
    ws = toy('term')
    p = worker(ws, wait=lambda es: any(e['event'] == 'step' and e['step'] >= 4 for e in es))
    assert send_signal(p, signal.SIGTERM) == 75
    assert events(ws)[-1]['event'] == 'stopped' and not ws.candidate.exists()
    step = last_checkpoint(ws)[1]['step']
    assert step == events(ws)[-1]['step'] >= 4
    assert worker(ws).exitcode == 0 and trained(ws)['resumed_from'] == step
    same_result(ws, uninterrupted)


def test_a_damaged_checkpoint_costs_only_its_steps(toy, uninterrupted):
    ws = toy('damaged', train__checkpoint_minutes=1e-4)
    p = worker(ws, wait=lambda es: any(e['event'] == 'checkpoint' and e['step'] >= 6 for e in es))
    send_signal(p, signal.SIGKILL)
    newest = max(next(ws.work.glob('train-*')).glob('checkpoints/0*'))
    f = newest / 'weights.safetensors'
    f.write_bytes(f.read_bytes()[:-9])
    assert worker(ws).exitcode == 0
    assert trained(ws)['resumed_from'] < int(newest.name)
    same_result(ws, uninterrupted)


def test_a_finished_run_is_not_trained_again(toy, uninterrupted):
    "A lost result (DVC removes outputs first) is written again from the last checkpoint."
    first = weights(uninterrupted.candidate)
    shutil.rmtree(uninterrupted.candidate)
    assert worker(uninterrupted).exitcode == 0
    assert weights(uninterrupted.candidate) == first and trained(uninterrupted)['resumed_from'] == 24


def test_two_at_once(toy):
    ws = toy(train__epochs=100)
    p = worker(ws, wait=lambda es: any(e['event'] == 'step' for e in es))
    assert worker(ws).exitcode == 2 and not any(e['event'] == 'failed' for e in events(ws))
    assert p.is_alive() and send_signal(p, signal.SIGTERM) == 75


# ---- the stage, with torchrun

# How far runs may differ after 8 steps of 0.002, because their sums round in another order.
# Losing the optimizer state makes 17 times that.
NEAR = 5e-4


@pytest.mark.parametrize('distributed', ['ddp', 'zero2', 'fsdp2'])
def test_stage_starts_torchrun_and_two_ranks_do_the_work_of_one(toy, distributed):
    from diffusers import DiffusionPipeline

    from flowerdiff.stages.train import run

    one, two = (
        toy('one', train__epochs=1),
        toy('two', train__epochs=1, train__num_processes=2, train__distributed=distributed),
    )
    assert worker(one).exitcode == 0 and '8 steps' in run(two.root).summary
    assert (trained(two)['processes'], trained(two)['distributed']) == (2, distributed)
    assert apart(one, two) < NEAR
    assert abs(trained(one)['validation']['loss'] - trained(two)['validation']['loss']) < 1e-3
    a, b = (DiffusionPipeline.from_pretrained(ws.candidate).unet.state_dict() for ws in (one, two))
    for k, v in a.items():
        assert v.dtype == b[k].dtype and np.allclose(v, b[k], atol=NEAR), k


# ---- other numbers of processes


def apart(a, b):
    """Return the largest difference between two checkpoints.

    Weights and averages count as they are, the optimizer state as a share of its largest value.
    """
    (ga, sa), (gb, sb) = [x if isinstance(x, tuple) else last_checkpoint(x) for x in (a, b)]
    assert sa['step'] == sb['step'] and {g: sorted(t) for g, t in ga.items()} == {
        g: sorted(t) for g, t in gb.items()
    }
    scale = dict.fromkeys(('step', 'exp_avg', 'exp_avg_sq'), 0.0)
    for name, value in ga['optimizer'].items():
        kind = name.split('.')[1]
        scale[kind] = max(scale[kind], float(value.abs().max()))
    differences = []
    for group, tensors in ga.items():
        for name, value in tensors.items():
            difference = float((value - gb[group][name]).abs().max())
            differences.append(difference / (scale[name.split('.')[1]] if group == 'optimizer' else 1.0))
    return max(differences)


class Ranks:
    "A run that is trained step by step, with any engine and any number of processes."

    def __init__(self, ws):
        self.ws, self.folder = ws, ws.root / 'steps'

    def __call__(self, upto, n=1, **settings):
        from train_worker import ranks, some_steps

        from flowerdiff.core.workspace import open_workspace

        open_workspace(self.ws.root, overrides={f'train.{k}': v for k, v in settings.items()})
        ranks(some_steps, str(self.ws.root), str(self.folder), upto, n=n)
        return [
            json.loads(Path(f'{self.folder}-{upto}-{i}.json').read_text(encoding='utf-8')) for i in range(n)
        ]

    def checkpoint(self):
        from flowerdiff.training.checkpoints import load_checkpoint

        return load_checkpoint(self.folder)


@pytest.fixture(scope='module')
def alone(toy):
    run = Ranks(toy('alone', train__epochs=1))
    (facts,) = run(8)
    return run.checkpoint(), facts


@pytest.mark.parametrize('distributed, kind', [('zero2', 'ZeroEngine'), ('fsdp2', 'ShardedEngine')])
def test_shards_data_and_memory(toy, alone, distributed, kind):
    """Each rank sees half of each batch and holds half of the masters, the optimizer state and the EMA.

    Together they take the steps of one.
    """
    from flowerdiff.data.batches import batch_indices

    whole, one = alone
    run = Ranks(toy(train__epochs=1))
    facts = run(8, n=2, distributed=distributed)
    assert {f['kind'] for f in facts} == {kind} and one['kind'] == 'Engine'
    for step in range(8):
        a, b = (f['pictures'][step] for f in facts)
        assert (
            len(a) == len(b) == 4 and not set(a) & set(b) and a + b == batch_indices(step, 8, 64, 0).tolist()
        )
    for f in facts:
        for what in ('masters', 'optimizer', 'ema'):
            assert 0.499 * one[what] < f[what] < 0.501 * one[what], (what, f)  # a row of one is not split
    assert apart(run.checkpoint(), whole) < NEAR and np.allclose(facts[0]['losses'], one['losses'], rtol=1e-3)


@pytest.mark.parametrize(
    'first, then',
    [
        ((2, 'zero2'), (1, 'auto')),
        ((1, 'auto'), (2, 'zero2')),
        ((2, 'zero2'), (2, 'ddp')),
        ((1, 'zero2'), (2, 'zero2')),
        ((2, 'fsdp2'), (1, 'auto')),
        ((2, 'zero2'), (2, 'fsdp2')),
    ],
)
def test_resumes_under_another_number_of_processes(toy, alone, first, then):
    run = Ranks(toy(train__epochs=1))
    for upto, (n, distributed) in ((4, first), (8, then)):
        facts = run(upto, n=n, distributed=distributed)
    assert facts[0]['first_step'] == 4 and apart(run.checkpoint(), alone[0]) < NEAR


@pytest.mark.parametrize('distributed', ['zero2', 'fsdp2'])
def test_shards_in_half_precision_are_near(toy, alone, distributed):
    "bfloat16 has three digits. Saved weights and averages are float32."
    _whole, one = alone
    run = Ranks(toy(train__epochs=1))
    facts = run(8, n=2, distributed=distributed, precision='bf16')
    assert np.allclose(facts[0]['losses'], one['losses'], rtol=0.02)
    groups, _ = run.checkpoint()
    assert all(str(v.dtype) == 'torch.float32' for t in groups.values() for v in t.values())
    assert any((v != v.bfloat16()).any() for v in groups['weights'].values())


@pytest.mark.parametrize('distributed', ['zero2', 'fsdp2'])
def test_a_batch_that_does_not_divide(toy, distributed):
    a, b = Ranks(toy(train__epochs=1, train__batch_size=7)), Ranks(toy(train__epochs=1, train__batch_size=7))
    (one,) = a(4)
    facts = b(4, n=2, distributed=distributed, accumulate=3)
    assert [len(f['pictures'][0]) for f in facts] == [3, 4]
    assert apart(a.checkpoint(), b.checkpoint()) < NEAR and np.allclose(
        facts[0]['losses'], one['losses'], rtol=1e-3
    )


def test_stage_raises_the_error_of_the_worker(toy):
    from flowerdiff.core.errors import UserError
    from flowerdiff.stages.train import run

    ws = toy()
    bad = next((ws.encoded / 'text').glob('*.bin'))
    bad.write_bytes(bad.read_bytes()[:-7])
    with pytest.raises(UserError, match=r'text-00000\.bin'):
        run(ws.root)
    shutil.rmtree(ws.encoded)
    with pytest.raises(UserError, match='run encode first'):
        run(ws.root)


def test_interrupted_cell_leaves_a_checkpoint(toy):
    "Ctrl-C in the notebook stops the run, and its checkpoint is kept."
    ws = toy(train__epochs=200)
    code = (
        'import signal\n'
        'signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it\n'
        f'from flowerdiff.stages.train import run; run({str(ws.root)!r})'
    )
    p = subprocess.Popen([sys.executable, '-c', code], env=ENV, stderr=subprocess.PIPE, text=True)
    end = time.time() + 200
    while not any(e['event'] == 'step' for e in events(ws)):
        assert p.poll() is None and time.time() < end
        time.sleep(0.05)
    p.send_signal(signal.SIGINT)
    p.wait(90)
    assert 'KeyboardInterrupt' in p.stderr.read()
    assert events(ws)[-1]['event'] == 'stopped' and last_checkpoint(ws)[1]['step'] > 0


# ---- more pictures than memory


def test_streamed_from_a_store(toy, tmp_path):
    """Shards from the disk or from a store give the same run, even when it is stopped halfway.

    It is not the run that has everything in memory.
    """
    from flowerdiff.data.shards import Shards, ShardWriter
    from flowerdiff.services.store import LocalStore, push

    def cut(ws):
        latents = Shards(ws.encoded / 'train', 'latents').load()
        for f in (ws.encoded / 'train').glob('latents*'):
            f.unlink()
        with ShardWriter(
            ws.encoded / 'train',
            'latents',
            {k: (v.shape[1:], str(v.dtype)) for k, v in latents.items()},
            shard_records=8,
        ) as w:
            w.append(**latents)

    near, far, whole = (
        toy(name, train__stream=stream) for name, stream in (('near', 2), ('far', 2), ('whole', 0))
    )
    for ws in (near, far):
        cut(ws)
    push(far.root, LocalStore(tmp_path / 'store'), ('encoded',))
    for f in (far.encoded / 'train').glob('*.bin'):
        f.unlink()
    for ws in (near, whole):
        assert worker(ws).exitcode == 0
    p = worker(far)
    assert p.exitcode == 2 and 'missing or not all there' in events(far)[-1]['message']
    from flowerdiff.core.workspace import open_workspace

    far = open_workspace(far.root, overrides={'train.stream_from': str(tmp_path / 'store')})
    p = worker(far, wait=lambda es: any(e['event'] == 'step' and e['step'] >= 9 for e in es))
    send_signal(p, signal.SIGTERM)
    assert worker(far).exitcode == 0
    same_result(far, near)
    assert (
        trained(whole)['validation'] != trained(near)['validation']
        and not list((far.encoded / 'train').glob('*.bin'))
        and not [f for f in far.work.glob('shards-*/**/*') if f.is_file()]
    )


# ---- tracking


def test_tracking_in_the_workspace(toy, monkeypatch):
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    from flowerdiff.services.tracking import experiment_name, mlflow_client
    from flowerdiff.stages.promote import run as promote

    ws = toy(tracking__enabled=True, train__epochs=1)
    assert worker(ws).exitcode == 0
    from test_tracking import sent

    folder = next(ws.work.glob('train-*'))
    end = time.time() + 120
    while not sent(ws):
        assert time.time() < end, (folder / 'tracking.log').read_text()
        time.sleep(0.2)
    client = mlflow_client(ws.root)
    exp = client.get_experiment_by_name(experiment_name(ws))
    (found,) = client.search_runs([exp.experiment_id])
    assert (
        found.info.status == 'FINISHED'
        and found.data.params['train.lr'] == '0.002'
        and found.data.tags['data'] == 'toy 64 False'
    )
    steps = client.get_metric_history(found.info.run_id, 'train/loss')
    assert [m.step for m in steps] == list(range(1, 9)) and steps[0].value == pytest.approx(
        trained(ws)['loss_curve'][0][1]
    )
    assert found.data.metrics['validation/loss'] == pytest.approx(trained(ws)['validation']['loss'])
    assert [a.path for a in client.list_artifacts(found.info.run_id, 'samples')] and list(
        (ws.root / 'tensorboard').rglob('events.*')
    )
    assert (
        'champion is version 1'
        in json.loads((promote(ws.root), (ws.root / 'promote.json').read_text())[1])['registry']
    )
    v = client.get_model_version_by_alias(experiment_name(ws), 'champion')
    assert v.tags['run_id'] == trained(ws)['run_id'] and v.run_id == found.info.run_id


def test_no_server_no_trouble(toy, monkeypatch):
    "An unreachable tracking server stops neither training nor promotion. The events are kept."
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'http://127.0.0.1:9')
    from flowerdiff.stages.promote import run as promote

    ws = toy(tracking__enabled=True, train__epochs=0.5)
    assert worker(ws, MLFLOW_TRACKING_URI='http://127.0.0.1:9').exitcode == 0 and promote(ws.root).promoted
    assert 'was not reached' in json.loads((ws.root / 'promote.json').read_text())['registry']
    assert len([e for e in events(ws) if e['event'] == 'step']) == 4


# ---- the gate


@pytest.fixture
def gate(toy):
    ws = toy('gate', train__epochs=0.2)
    assert worker(ws).exitcode == 0
    return ws


def another(ws, factor=None, run_id='another', unet=True, **fields):
    "Make the candidate another model, with its losses times `factor`."
    from flowerdiff.core.checksums import write_checksums

    t = trained(ws)
    t['run_id'] = run_id
    t |= fields
    if factor:
        t['validation']['by_picture'] = [
            factor * x * (1 + 0.001 * (i % 3)) for i, x in enumerate(t['validation']['by_picture'])
        ]
    (ws.root / 'train.json').write_text(json.dumps(t))
    if unet:
        c = ws.candidate / 'unet' / 'config.json'
        c.write_text(
            json.dumps(
                json.loads(c.read_text()) | dict(another=json.loads(c.read_text()).get('another', 0) + 1)
            )
        )
        write_checksums(ws.candidate)


def promote(ws):
    from flowerdiff.stages.promote import run

    return run(ws.root), json.loads((ws.root / 'promote.json').read_text())


def test_gate(gate):
    ws = gate
    r, record = promote(ws)
    assert r.promoted and record['reason'] == 'the first model'
    record = json.loads((ws.model / 'record.json').read_text())
    assert (
        record['run_id'] == trained(ws)['run_id']
        and len(record['by_picture']) == 16
        and record['data'] == 'toy 64 False'
    )
    first = weights(ws.model)
    times = {p: p.stat().st_mtime_ns for p in ws.model.rglob('*')}
    for change, why in (
        (dict(unet=False), 'champion already'),
        (dict(factor=1.0), 'no better'),
        (dict(factor=1.05), 'no better'),
        (dict(factor=float('nan')), 'not numbers'),
    ):
        keep = (ws.root / 'train.json').read_text()
        another(ws, **change)
        r, record = promote(ws)
        (ws.root / 'train.json').write_text(keep)
        assert not r.promoted and why in record['reason'], record
        assert weights(ws.model) == first and {p: p.stat().st_mtime_ns for p in ws.model.rglob('*')} == times
    another(ws, 0.9, 'better')
    r, record = promote(ws)
    assert (
        r.promoted
        and record['champion'] == 'better'
        and record['mean_difference'] == pytest.approx(0.099, abs=0.01)
    )
    assert weights(ws.work / 'previous') == first
    assert [
        json.loads(line)['promoted'] for line in (ws.work / 'decisions.jsonl').read_text().splitlines()
    ] == [
        True,
        False,
        False,
        False,
        False,
        True,
    ]


def test_margin(gate):
    from flowerdiff.core.workspace import open_workspace

    promote(gate)
    another(gate, 0.97)
    open_workspace(gate.root, overrides={'promote.margin': 0.05})
    assert not promote(gate)[0].promoted
    open_workspace(gate.root, overrides={'promote.margin': 0.01})
    assert promote(gate)[0].promoted


def test_champion_is_measured_again_on_other_data(gate):
    """The record of the champion does not count when the data changed, or when it is broken.

    Measuring the champion again gives the losses of its own training.
    """
    from flowerdiff.core.checksums import write_checksums
    from flowerdiff.stages.promote import measure_champion

    promote(gate)
    levels = trained(gate)['validation']['levels']
    assert np.allclose(measure_champion(gate, levels), trained(gate)['validation']['by_picture'], rtol=1e-3)
    record = json.loads((gate.model / 'record.json').read_text())
    record['by_picture'] = [0.0] * 16
    (gate.model / 'record.json').write_text(json.dumps(record))
    write_checksums(gate.model)
    another(gate, 0.9)
    assert not promote(gate)[0].promoted  # the record says the champion is perfect
    another(gate, data='other data')
    assert promote(gate)[0].promoted  # asked again, it is not
    (gate.model / 'record.json').write_text('{')
    write_checksums(gate.model)
    another(gate, 0.8, 'third')
    assert promote(gate)[0].promoted


def test_champion_of_another_autoencoder_or_architecture(gate):
    from flowerdiff.core.checksums import write_checksums

    promote(gate)
    config = gate.model / 'vae' / 'config.json'
    config.write_text(config.read_text().replace('"scaling_factor": 0.18215', '"scaling_factor": 0.5'))
    write_checksums(gate.model)
    another(gate, 1.5, 'new space')
    r, record = promote(gate)
    assert (
        r.promoted
        and 'not comparable' in record['reason']
        and (gate.work / 'previous' / 'model_index.json').exists()
    )
    record = json.loads((gate.model / 'record.json').read_text())
    record['data'] = 'older'
    (gate.model / 'record.json').write_text(json.dumps(record))
    config = gate.model / 'unet' / 'config.json'
    config.write_text('{}')
    write_checksums(gate.model)
    another(gate, 1.5, 'again')
    r, record = promote(gate)
    assert r.promoted and 'cannot be measured' in record['reason']


@pytest.fixture
def two_champions(gate):
    promote(gate)
    first = weights(gate.model)
    another(gate, 0.9, 'better')
    promote(gate)
    return gate, first, weights(gate.model)


def test_roll_back_and_forth(two_champions):
    from flowerdiff.stages.promote import roll_back

    ws, first, second = two_champions
    roll_back(ws.root)
    assert weights(ws.model) == first and weights(ws.work / 'previous') == second
    r, record = promote(ws)
    assert not r.promoted and 'rolled back' in record['reason'] and weights(ws.model) == first
    roll_back(ws.root)
    assert weights(ws.model) == second and weights(ws.work / 'previous') == first
    r, record = promote(ws)
    assert not r.promoted and 'champion already' in record['reason']


def test_roll_back_where_there_is_nothing(gate, tmp_path):
    for root, message in ((tmp_path / 'none', 'is not a workspace'), (gate.root, 'no champion before')):
        done = subprocess.run(
            [sys.executable, '-m', 'flowerdiff.pipeline.cli', 'rollback', str(root)],
            capture_output=True,
            text=True,
        )
        assert (
            done.returncode == 2
            and message in done.stderr
            and done.stderr.count('\n') == 1
            and not (tmp_path / 'none').exists()
        ), done


def test_promote_needs_a_candidate(toy):
    from flowerdiff.core.errors import UserError

    with pytest.raises(UserError, match='run train first'):
        promote(toy())


# ---- a student


@pytest.fixture(scope='module')
def student_workspace(toy):
    "Return a function that makes a workspace with a champion, whose settings ask for a student."
    from flowerdiff.core.workspace import open_workspace

    ws = toy('teacher', train__epochs=2)
    assert worker(ws).exitcode == 0
    shutil.copytree(ws.candidate, ws.model)

    def make(name):
        root = ws.root.parent / name
        shutil.copytree(ws.root, root, ignore=shutil.ignore_patterns('work', 'candidate', 'train.json'))
        return open_workspace(
            root,
            overrides={
                'train.distill': 2,
                'train.distill_epochs': 2,
                'train.distill_lr': 1e-3,
                'train.checkpoint_minutes': 1e-4,
            },
        )

    return make


def test_a_killed_student_is_the_same_student(student_workspace):
    whole, killed = student_workspace('student'), student_workspace('killed')
    assert worker(whole).exitcode == 0
    p = worker(killed, wait=lambda es: any(e['event'] == 'checkpoint' and e['step'] >= 5 for e in es))
    send_signal(p, signal.SIGKILL)
    assert worker(killed).exitcode == 0 and trained(killed)['resumed_from'] >= 5
    same_result(killed, whole)
    assert (
        trained(whole)['validation']['timesteps'] == [999, 499]
        and len(trained(whole)['validation']['by_picture']) == 16
    )
    assert weights(whole.model) == weights(killed.model)
    teacher, student = (
        whole.model / 'unet' / 'diffusion_pytorch_model.safetensors',
        whole.candidate / 'unet' / 'diffusion_pytorch_model.safetensors',
    )
    assert teacher.read_bytes() != student.read_bytes()


def test_a_student_samples_as_it_was_trained(student_workspace):
    from diffusers import DiffusionPipeline

    from flowerdiff.inference.generator import Generator

    ws = student_workspace('sampled')
    assert worker(ws).exitcode == 0
    generator = Generator.from_pretrained(ws.candidate)
    steps = []
    mine = generator('a rose', seed=3, callback=lambda s: steps.append(s.steps))[0]
    assert steps == [2, 2]
    champion = Generator.from_pretrained(ws.model).backend
    assert (champion.steps, champion.guidance) == (20, 4.0)
    pipe = DiffusionPipeline.from_pretrained(ws.candidate)
    pipe.set_progress_bar_config(disable=True)
    import torch

    stock = pipe(
        'a rose', num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(3)
    ).images[0]
    assert np.abs(np.asarray(mine, int) - np.asarray(stock, int)).max() <= 1


def test_no_student_without_a_champion(toy):
    from flowerdiff.core.errors import UserError
    from flowerdiff.stages.train import run

    ws = toy('alone', train__distill=4)
    with pytest.raises(UserError, match='there is no champion to learn from; train one first') as e:
        run(str(ws.root))
    assert '\n' not in str(e.value)
    assert worker(ws).exitcode == 2
    shutil.copytree(ws.encoded / 'components' / 'vae', ws.model / 'vae')
    shutil.copytree(ws.encoded / 'components' / 'text_encoder', ws.model / 'text_encoder')
    (ws.model / 'model_index.json').write_text('{}')
    (ws.model / 'text_encoder' / 'config.json').write_text('{"another": 1}')
    with pytest.raises(UserError, match='the champion has another text_encoder than the encoded data'):
        run(str(ws.root))


def test_two_ranks_train_the_student_that_one_trains(student_workspace, tmp_path):
    from train_worker import ranks, some_steps

    ws = student_workspace('ranks')
    for n in (1, 2):
        ranks(some_steps, str(ws.root), str(tmp_path / f'n{n}'), 4, n=n)
    from flowerdiff.training.checkpoints import load_checkpoint

    a, b = (load_checkpoint(tmp_path / f'n{n}')[0]['weights'] for n in (1, 2))
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-4
