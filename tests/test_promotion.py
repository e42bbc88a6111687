"""A promotion that was killed at any change of the disk ends as an undisturbed one, its record included."""

import json
import os
import shutil
import signal
import sys

import pytest
from tiny import tiny_model

from flowerdiff.core.checksums import verify_folder, write_checksums
from flowerdiff.core.files import read_json, write_json
from flowerdiff.core.workspace import open_workspace
from flowerdiff.stages import promote

STAMPS = ('promoted', 'time', 'finished', 'seconds', 'id', 'decision')  # differ from run to run


def make_candidate(ws, run_id, factor=1.0, steps=0):
    "Write a candidate with its losses, as training does."
    shutil.rmtree(ws.candidate, ignore_errors=True)
    tiny_model(ws.candidate)
    config = ws.candidate / 'unet' / 'config.json'
    write_json(config, read_json(config) | dict(of=run_id))
    train = dict(distill=steps)
    write_json(ws.candidate / 'train_settings.json', dict(train=train, run_id=run_id, checksums=True))
    write_checksums(ws.candidate)
    losses = [factor * (1 + 0.01 * (i % 7)) for i in range(40)]
    validation = dict(loss=factor, levels=[0.5], by_level=[factor], by_picture=losses)
    write_json(ws.root / 'train.json', dict(run_id=run_id, data='tiny', steps=9, validation=validation))


@pytest.fixture(scope='module')
def champion(tmp_path_factory):
    "A workspace with two champions, one after the other, and a better candidate."
    root = tmp_path_factory.mktemp('promotion') / 'ws'
    ws = open_workspace(root, 'garden', {'tracking.enabled': False})
    for run_id, factor in (('first', 1.0), ('second', 0.8)):
        make_candidate(ws, run_id, factor)
        assert promote.run.plain(ws).promoted
    make_candidate(ws, 'third', 0.6)
    return ws


def copy_of(ws, root):
    shutil.copytree(ws.root, root)
    return open_workspace(root)


def kill_at(count, root):
    "Kill this process at a change of the disk below a folder, after `count` others."
    changes = iter(range(count))

    def hook(event, args):
        changing = event in ('os.rename', 'os.mkdir', 'os.rmdir') or (
            event == 'open' and str(args[0]).endswith('.jsonl') and args[2] & os.O_CREAT
        )
        if changing and str(args[0]).startswith(str(root)) and next(changes, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(action, ws, count):
    "Run an action in a process of its own that is killed; return whether it was."
    pid = os.fork()
    if not pid:
        try:
            kill_at(count, ws.root)
            action(ws)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def without_stamps(value):
    if isinstance(value, dict):
        kept = {key: v for key, v in value.items() if key not in STAMPS or isinstance(v, bool)}
        return {key: without_stamps(v) for key, v in kept.items()}
    return value


def state(ws):
    "Return everything that a run leaves, without the times in it."
    found = {}
    for path in sorted(ws.root.rglob('*')):
        name = path.relative_to(ws.root).as_posix()
        if '.tmp-' in name:
            continue  # what a killed process was writing, or removing
        if not path.is_file():
            found[name] = 'folder'
        elif path.suffix == '.jsonl':
            lines = path.read_text(encoding='utf-8').replace(str(ws.root), '').splitlines()
            found[name] = [without_stamps(json.loads(line)) for line in lines]
        elif path.name == 'checksums.json':
            found[name] = sorted(read_json(path)['files'])
        elif path.suffix == '.json':
            text = path.read_text(encoding='utf-8').replace(str(ws.root), '')
            found[name] = without_stamps(json.loads(text))
        else:
            found[name] = path.read_bytes()
    return found


def promote_it(ws):
    promote.run.plain(ws)


def roll_it_back(ws):
    promote.roll_back(ws.root)


def check_every_kill(start, action, tmp_path, stride=1):
    "Kill an action at every change of the disk, or some; the next start ends like an undisturbed one."
    whole = copy_of(start, tmp_path / 'whole' / 'ws')
    action(whole)
    expected = state(whole)
    count = 0
    while True:
        ws = copy_of(start, tmp_path / f'{count}' / 'ws')
        if not killed(action, ws, count):
            break
        if state(ws) != expected:  # a finished rollback is not repeated
            action(ws)
        assert state(ws) == expected, count
        for folder in (ws.model, ws.work / 'previous'):
            verify_folder(folder, again=True)
        shutil.rmtree(ws.root)
        count += stride
    return count, whole


def test_a_promotion_is_killed_at_every_change_of_the_disk(champion, tmp_path):
    "Breaks when the decision is not written first, or a step cannot be repeated, or is logged twice."
    count, whole = check_every_kill(champion, promote_it, tmp_path)
    assert count > 15
    report = read_json(whole.root / 'promote.json')
    assert report['promoted'] and report['champion'] == 'third' and report['before'] == 'second'
    log = [json.loads(line) for line in (whole.work / 'decisions.jsonl').read_text().splitlines()]
    assert [event['run_id'] for event in log] == ['first', 'second', 'third']


def test_a_rollback_is_killed_at_changes_of_the_disk(champion, tmp_path):
    "Breaks when a killed rollback exchanges the champions twice, loses one, or is logged twice."
    count, whole = check_every_kill(champion, roll_it_back, tmp_path, 2)
    assert count > 15
    assert promote.read_record(whole)['run_id'] == 'first'
    assert read_json(whole.work / 'previous' / 'record.json')['run_id'] == 'second'
    assert not (whole.work / 'rolling-back').exists()


def test_a_student_is_killed_at_changes_of_the_disk(champion, tmp_path, monkeypatch):
    "Breaks when a student that passed is recorded as one that did not, or is measured again."
    result = promote.StudentResult(True, 'a fixed result', dict(lost=0.0))
    monkeypatch.setattr(promote, 'decide_student', lambda *_: result)
    start = copy_of(champion, tmp_path / 'start' / 'ws')
    make_candidate(start, 'student', steps=4)
    count, whole = check_every_kill(start, promote_it, tmp_path, 3)
    assert count > 8
    report = read_json(whole.root / 'promote.json')
    assert report['student'] == dict(lost=0.0, passed=True) and not report['promoted']
    monkeypatch.setattr(promote, 'decide_student', None)  # the decision stands
    promote_it(whole)
    assert read_json(whole.root / 'promote.json') == report


def test_a_rollback_finishes_a_killed_promotion_first(champion, tmp_path):
    "Breaks when a rollback after a killed promotion goes back to the same model."
    count = 0
    ws = copy_of(champion, tmp_path / '0' / 'ws')
    while killed(promote_it, ws, count) and not (ws.work / 'promotion.json').read_text().count('"third"'):
        count += 1
        ws = copy_of(champion, tmp_path / f'{count}' / 'ws')
    roll_it_back(ws)
    assert promote.read_record(ws)['run_id'] == 'second'
    assert read_json(ws.work / 'previous' / 'record.json')['run_id'] == 'third'


def test_a_damaged_champion_is_not_certified(champion, tmp_path):
    "Breaks when the champion's record is compared with the candidate, and not its bytes."
    ws = copy_of(champion, tmp_path / 'ws')
    promote_it(ws)
    report = (ws.root / 'promote.json').read_bytes()
    weights = ws.model / 'unet' / 'diffusion_pytorch_model.safetensors'
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(promote.UserError, match=r'checksum differs.*the same model from candidate') as e:
        promote_it(ws)
    assert '\n' not in str(e.value) and (ws.root / 'promote.json').read_bytes() == report
    record = promote.read_record(ws)
    shutil.rmtree(ws.model)  # as the message says
    promote_it(ws)
    verify_folder(ws.model, again=True)
    assert promote.read_record(ws) == record and (ws.root / 'promote.json').read_bytes() == report
