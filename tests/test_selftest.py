"The self-test: its parts run in processes of their own, and a training step waits for the device once."

import json
import os
import time
from pathlib import Path

import pytest
import torch

from flowerdiff.core.errors import UserError
from flowerdiff.selftest import parts as parts_module
from flowerdiff.selftest import report
from flowerdiff.selftest.measuring import host_waits
from flowerdiff.selftest.parts import FAILED, NOT_RUN, PASSED, Part, PartResult
from flowerdiff.selftest.training_parts import step_waits, tiny_trainer
from flowerdiff.training.accelerator import Engine


@pytest.fixture
def own_parts(monkeypatch):
    "Parts whose functions are in this file."
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([os.path.dirname(__file__), os.environ['PYTHONPATH']]))

    def make(name, **options):
        return Part(name, f'{name} as it should', f'part_functions:{name}', **options)

    return make


def test_each_end_of_a_part(own_parts, tmp_path, monkeypatch):
    "A failure, a crash and a hang end neither the others nor the test, and leave no process behind."
    monkeypatch.setenv('CHILD_FILE', str(tmp_path / 'child'))
    monkeypatch.setitem(parts_module.NEEDS, 'moon', lambda: 'no moon')
    made = [
        own_parts('fails'),
        own_parts('crashes'),
        own_parts('hangs', seconds=12),
        own_parts('works'),
        own_parts('never', needs=('moon',)),
    ]
    lines = []
    found = report.run_selftest(tmp_path, made, lines.append)
    by_name = {result.name: result for result in found.results}
    assert [r.status for r in found.results] == [FAILED, FAILED, FAILED, PASSED, NOT_RUN] and found.failed
    assert by_name['fails'].message == 'AssertionError: the losses differ by 3e-01'
    assert by_name['crashes'].message.startswith('crashed with SIGSEGV')
    assert by_name['hangs'].message == 'took more than 12 s and was ended'
    assert by_name['works'].measured == dict(samples_per_second=12.345678, note='a|b')
    assert by_name['never'].message == 'no moon'
    assert len(lines) == 7 and ' 4/5  works' in lines[3]
    assert not is_alive(int((tmp_path / 'child').read_text()))
    check_page(tmp_path, found)


def is_alive(pid, patience=10):
    "Whether a process still runs after a while; one that has ended may wait to be collected."
    import psutil

    end = time.time() + patience
    while time.time() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.1)
    return True


def check_page(folder, found):
    page = (folder / 'selftest.md').read_text()
    assert '1 passed, 3 failed, 1 not run.' in page
    assert '| works | passed |' in page and 'samples per second 12.3, note a\\|b |' in page
    assert '| never | not run |' in page and '- torch: ' + torch.__version__.split('+')[0] in page
    assert '## fails' in page and 'the log of a failure' in page and 'secret' not in page
    assert 'gh issue create' in page and f'--body-file "{folder / "selftest.md"}"' in page
    content = json.loads((folder / 'selftest.json').read_text())
    assert content == found.as_json() and content['passed'] is False
    assert [part['name'] for part in content['parts']] == ['fails', 'crashes', 'hangs', 'works', 'never']


def test_training_takes_what_was_fastest(tmp_path, monkeypatch):
    "With `train.compile: auto`, on the same GPU, and never on a CPU."
    monkeypatch.setattr(Path, 'home', lambda: tmp_path)
    speeds = dict(eager_samples_per_second=100.0, compiled_samples_per_second=150.0)
    found = [PartResult('compiled', '', PASSED, measured=speeds)]
    compiled = []
    monkeypatch.setattr(Engine, 'compile', lambda self, cuda_graphs: compiled.append(cuda_graphs))
    engine = Engine()
    report.remember_speeds(report.Report(report.describe_machine(), found))
    assert not list(tmp_path.iterdir()) and tiny_trainer(engine=engine).compilation == 'eager'
    machine = report.describe_machine() | dict(GPU='NVIDIA T4, capability 7.5, 15 GiB')
    report.remember_speeds(report.Report(machine, found))
    assert tiny_trainer(engine=engine).compilation == 'eager' and not compiled
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'NVIDIA T4')
    monkeypatch.setenv('CC', 'cp')  # a program that is there
    assert tiny_trainer(engine=engine).compilation == 'compiled' and compiled == [False]
    assert tiny_trainer(engine=engine, compile=False).compilation == 'eager'


def test_every_part_can_be_found():
    "Each names a function that exists, with needs that are known."
    import importlib

    for part in report.PARTS:
        module, name = part.function.split(':')
        assert callable(getattr(importlib.import_module(module), name))
        assert set(part.needs) <= set(parts_module.NEEDS)
    assert len({part.name for part in report.PARTS}) == len(report.PARTS)
    with pytest.raises(UserError, match="selftest: 'fp8' is not one of fp32, tf32"):
        report.select_parts(['fp8'])


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_the_command(cli, tmp_path):
    "Two parts for real: one passes, and one needs a GPU, which is no failure."
    p = cli('selftest', '--only', 'resume', '--only', 'tf32', '-o', tmp_path, '--json')
    assert p.returncode == 0, p.stderr
    content = json.loads(p.stdout)
    assert [(part['name'], part['status']) for part in content['parts']] == [
        ('tf32', NOT_RUN),
        ('resume', PASSED),
    ]
    assert 'no GPU' in p.stderr and '1 passed, 0 failed, 1 not run' in p.stderr
    wrong = cli('selftest', '--only', 'fp8', '-o', tmp_path / 'new')
    assert wrong.returncode == 2 and "'fp8' is not one of" in wrong.stderr
    assert not (tmp_path / 'new').exists()


def test_a_failed_part_is_exit_status_1(own_parts, tmp_path, monkeypatch, capsys):
    from flowerdiff.pipeline import cli as command_line

    monkeypatch.setattr(report, 'select_parts', lambda names: [own_parts('fails')])
    assert command_line.main(['selftest', '-o', str(tmp_path)]) == 1
    assert '0 passed, 1 failed' in capsys.readouterr().out


# ---- waits


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_step_waits_once(accumulate):
    "For the gradient norm, in whatever precision, and not in the loss meter, the averages or the scaler."
    for precision in ('fp32', 'bf16'):
        found = step_waits(
            tiny_trainer(precision, accumulate=accumulate, ema_decays=[0.9], channels=[16, 32])
        )
        assert len(found) == 1 and found[0].startswith('accelerator.py') and found[0].endswith(' step'), found


def test_a_skipped_update_of_muon_waits_no_more():
    "An optimizer without support for a scaler waits no more than AdamW."
    found = step_waits(tiny_trainer(optimizer='muon', channels=[16, 32]))
    assert len(found) == 1, found


@pytest.mark.parametrize(
    'wait',
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.tolist(),
    ],
)
def test_each_wait_is_counted(wait):
    x = torch.ones(3)
    assert len(host_waits(lambda: wait(x))) == 1
    assert not host_waits(lambda: x.mul(2).sum().clamp(max=1))


def test_batches_for_a_gpu_go_through_pinned_memory(monkeypatch):
    "Every copy from the host that `make_batch` starts is from pinned memory, and is not waited for."
    from flowerdiff.data import batches

    pinned, copies = [], []
    real_to = torch.Tensor.to

    def pin(x):
        pinned.append(x.data_ptr())
        return x

    def to(x, device, *args, **kwargs):
        if torch.device(device).type != 'cuda':
            return real_to(x, device, *args, **kwargs)
        copies.append((x.data_ptr() in pinned, kwargs.get('non_blocking')))
        return x

    monkeypatch.setattr(torch.Tensor, 'pin_memory', pin)
    monkeypatch.setattr(torch.Tensor, 'to', to)
    batches.make_batch(batches.toy_split(), 0, 0, 8, device='cuda')
    assert copies == [(True, True)] * 4
