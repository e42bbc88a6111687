"Training that goes on from a finished run: what is carried over, interruptions, several processes, disk."

import shutil
import signal

import pytest
from test_train import (  # noqa: F401
    events,
    last_checkpoint,
    make_encoded,
    parts,
    send_signal,
    toy,
    trained,
    weights,
    worker,
)


def go_on(ws, **settings):
    "Ask for more training. Returns the workspace with its new settings."
    from flowerdiff.core.workspace import open_workspace
    from flowerdiff.training.continuing import request_continuing, run_folder

    ws = open_workspace(ws.root, overrides={f'train.{k}': v for k, v in settings.items()})
    request_continuing(ws)
    run_folder(ws)
    return ws


def run_of(ws):
    from flowerdiff.training.continuing import run_folder

    return run_folder(ws)


def checkpoint(ws):
    from flowerdiff.training.checkpoints import load_checkpoint

    return load_checkpoint(run_of(ws) / 'checkpoints')


def assert_same_weights(a, b):
    (ga, sa), (gb, sb) = checkpoint(a), checkpoint(b)
    assert ga.keys() == gb.keys()
    for group in ga:
        assert ga[group].keys() == gb[group].keys()
        for name, value in ga[group].items():
            assert (value == gb[group][name]).all(), (group, name)
    for key in ('step', 'losses', 'updates', 'norms', 'sums', 'total'):
        assert sa[key] == sb[key], key


def test_one_epoch_and_two_more_are_three(toy):  # noqa: F811
    "With a constant rate, going on is the whole run, bit for bit: optimizer, averages and norms are carried."
    options = dict(train__lr_schedule='constant', train__ema_decays=[0.9])
    whole = toy('whole', **options)
    part = toy('part', train__epochs=1, **options)
    assert worker(whole).exitcode == worker(part).exitcode == 0
    first = trained(part)
    part = go_on(part, epochs=3)
    assert worker(part).exitcode == 0
    assert_same_weights(whole, part)
    a, b = trained(whole), trained(part)
    same = ('validation', 'loss_curve', 'steps', 'samples', 'epochs')
    assert {key: a[key] for key in same} == {key: b[key] for key in same}
    assert (a['continued_from'], b['resumed_from']) == (None, 0)
    assert b['continued_from'] == dict(run_id=first['run_id'], step=8) and b['steps'] == 24
    assert b['seconds'] > first['seconds'] and first['run_id'] != b['run_id']
    assert [8, first['validation']['loss']] in b['validation_curve']
    unet = 'unet/diffusion_pytorch_model.safetensors'
    assert weights(whole.candidate)[unet] == weights(part.candidate)[unet]


CHANGES = dict(
    epochs=3, lr=1e-3, batch_size=4, ema_decays=[0.5], checkpoint_minutes=1e-4, validate_every=5, beta2=0.98
)


@pytest.fixture(scope='module')
def undisturbed(toy):  # noqa: F811
    ws = toy('undisturbed', train__epochs=1)
    assert worker(ws).exitcode == 0
    ws = go_on(ws, **CHANGES)
    assert worker(ws).exitcode == 0
    return ws


def test_another_rate_batch_and_average(undisturbed):
    "The rate rises from where it ended to the new one, and falls over the second half of what remains."
    info = trained(undisturbed)
    assert info['steps'] == 8 + 2 * 64 // 4 and info['samples'] == 3 * 64 and info['epochs'] == 3
    steps = [e for e in events(undisturbed) if e['event'] == 'step' and e['step'] > 8 and e['total'] == 40]
    rates = {e['step']: e['lr'] for e in steps}
    assert 0 < rates[9] < rates[10] == rates[20] == 1e-3 > rates[30] > rates[40] > 0
    groups, _ = checkpoint(undisturbed)
    assert (groups['ema']['conv_in.weight'] != groups['ema1']['conv_in.weight']).any()


def test_interrupted_continuing_is_the_undisturbed(toy, undisturbed):  # noqa: F811
    "Killed twice, also right at its beginning, and started again without asking for it once more."
    ws = toy('interrupted', train__epochs=1)
    assert worker(ws).exitcode == 0
    ws = go_on(ws, **CHANGES)
    for upto in (9, 20):
        p = worker(
            ws, wait=lambda es, upto=upto: any(e['event'] == 'checkpoint' and e['step'] >= upto for e in es)
        )
        send_signal(p, signal.SIGKILL)
    assert worker(ws).exitcode == 0
    assert trained(ws)['resumed_from'] >= 20 and trained(ws)['continued_from']['step'] == 8
    assert_same_weights(ws, undisturbed)
    assert trained(ws)['validation'] == trained(undisturbed)['validation']
    assert trained(ws)['validation_curve'] == trained(undisturbed)['validation_curve']


def test_again_and_again_with_one_run_on_the_disk(toy):  # noqa: F811
    "The checkpoints of one finished run stay; a plain change starts anew and says how to go on."
    from flowerdiff.core.errors import UserError
    from flowerdiff.core.workspace import open_workspace
    from flowerdiff.stages.train import run
    from flowerdiff.training.continuing import drop_old_checkpoints, request_continuing

    ws = toy('again', train__epochs=0.5)
    assert worker(ws).exitcode == 0
    for epochs in (1, 1.5):
        ws = go_on(ws, epochs=epochs)
        assert worker(ws).exitcode == 0
        drop_old_checkpoints(ws, run_of(ws))
        kept = [folder.parent for folder in ws.work.glob('train-*/checkpoints')]
        assert kept == [run_of(ws)] and len(list(kept[0].glob('checkpoints/*'))) <= 3
        assert trained(ws)['continued_from']['step'] == 8 * epochs - 4
        request_continuing(ws)  # the same again: done
        assert worker(ws).exitcode == 0 and trained(ws)['steps'] == 8 * epochs
    with pytest.raises(UserError, match=r'train.epochs: 1.5 epochs are done and 1 are asked for'):
        go_on(ws, epochs=1)
    ws = open_workspace(ws.root, overrides={'train.epochs': 0.5, 'train.lr': 1e-3})
    old = run_of(ws)
    result = run(ws.root)
    assert result.train['continued_from'] is None and 'continued' not in result.summary
    assert [folder.parent for folder in ws.work.glob('train-*/checkpoints')] == [old]
    notes = [e['text'] for e in events(ws) if e['event'] == 'note']
    assert 'starts from the beginning; to go on from the 12 steps of the run before, use --continue' in str(
        notes
    )


def test_a_lost_checkpoint_is_one_line(toy):  # noqa: F811
    "It never trains from the beginning under the name of a longer run."
    from flowerdiff.core.errors import UserError

    ws = toy('lost', train__epochs=0.5)
    assert worker(ws).exitcode == 0
    continued = go_on(ws, epochs=1)
    shutil.rmtree(run_of(continued) / 'checkpoints')
    for path in ws.work.glob('train-*/checkpoints/*/weights.safetensors'):
        path.unlink()
    assert worker(continued).exitcode == 2
    messages = [e['message'] for e in events(continued) if e['event'] == 'failed']
    assert len(messages) == 1 and 'is gone; add --force to train from the beginning' in messages[0]
    for path in ws.work.glob('train-*/checkpoints'):
        shutil.rmtree(path)
    with pytest.raises(UserError, match=r'the last checkpoint of the run .* is not here'):
        go_on(ws, epochs=2)


def test_more_pictures(toy, parts):  # noqa: F811
    "The data may grow; another autoencoder may not come in between."
    from flowerdiff.core.errors import UserError
    from flowerdiff.core.files import write_json
    from flowerdiff.training.continuing import request_continuing, run_folder
    from flowerdiff.training.trained_on import KEYS, read_trained_on

    ws = toy('grown', train__epochs=1)
    write_json(ws.encoded / 'train' / KEYS, ['old'])
    assert worker(ws).exitcode == 0
    shutil.rmtree(ws.encoded)
    make_encoded(ws.root, parts, n=128)
    write_json(ws.encoded / 'train' / KEYS, ['new'])
    ws = go_on(ws, epochs=2)
    assert worker(ws).exitcode == 0
    assert read_trained_on(ws.candidate) == {'old', 'new'}  # the gate compares on neither
    assert trained(ws)['steps'] == 8 + 16 and trained(ws)['epochs'] == 2
    assert min(step for step, _ in trained(ws)['validation_curve']) > 8  # of other pictures
    config = ws.encoded / 'components' / 'vae' / 'config.json'
    config.write_text(config.read_text().replace('"latent_channels"', '"other": 1, "latent_channels"'))
    request_continuing(open_with(ws, epochs=3))
    with pytest.raises(UserError, match=r'components.autoencoder: the pictures are encoded with another'):
        run_folder(open_with(ws, epochs=3))


def open_with(ws, **settings):
    from flowerdiff.core.workspace import open_workspace

    return open_workspace(ws.root, overrides={f'train.{k}': v for k, v in settings.items()})


@pytest.mark.parametrize('distributed', ['ddp', 'zero2'])
def test_two_processes_go_on(toy, distributed):  # noqa: F811
    from test_train import NEAR, apart
    from train_worker import ranks, run_in_process

    options = dict(train__lr_schedule='constant', train__num_processes=2, train__distributed=distributed)
    part = toy('part', train__epochs=0.5, **options)
    ranks(run_in_process, str(part.root), '', (), n=2)
    part = go_on(part, epochs=1)
    ranks(run_in_process, str(part.root), '', (), n=2)
    whole = toy('whole', train__epochs=1, train__lr_schedule='constant')
    assert worker(whole).exitcode == 0
    assert trained(part)['processes'] == 2 and trained(part)['continued_from']['step'] == 4
    assert apart(checkpoint(part), last_checkpoint(whole)) < NEAR
