# ruff: noqa: F811 (fixtures)
"Tracking with a real `mlflow server` on this machine, and with one that is offline or does not respond."

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from test_train import events, parts, toy, trained, worker  # noqa: F401 (fixtures among them)


@contextmanager
def mlflow_server(folder, port):
    env = dict(os.environ, MLFLOW_DISABLE_TELEMETRY='true', DO_NOT_TRACK='true')
    command = [
        sys.executable,
        '-m',
        'mlflow',
        'server',
        '--host',
        '127.0.0.1',
        '--port',
        str(port),
        '--workers',
        '1',
        '--backend-store-uri',
        f'sqlite:///{folder}/m.db',
        '--artifacts-destination',
        str(folder / 'artifacts'),
    ]
    with open(folder / 'server.log', 'w', encoding='utf-8') as log:
        p = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    end = time.time() + 120
    try:
        while True:
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=2)
                break
            except OSError:
                assert p.poll() is None and time.time() < end, (folder / 'server.log').read_text()
                time.sleep(0.2)
        yield f'http://127.0.0.1:{port}'
    finally:
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()


def sent(ws):  # has every run's every event reached both destinations?
    seen = [
        (
            json.loads((f / 'tracked.json').read_text()) if (f / 'tracked.json').exists() else {},
            (f / 'events.jsonl').stat().st_size,
        )
        for f in ws.work.glob('train-*')
    ]
    return all(
        state.get(k, {}).get('offset') == size for state, size in seen for k in ('tensorboard', 'mlflow')
    )


def test_what_a_silent_server_missed_is_sent_later(toy, tmp_path, monkeypatch):
    """The first run meets a server that accepts connections and never responds, the second a real one.
    Then the server has both runs, complete."""
    from flowerdiff.core.workspace import open_workspace
    from flowerdiff.services.tracking import experiment_name, mlflow_client
    from flowerdiff.stages.promote import run as promote

    ws = toy(tracking__enabled=True, train__epochs=1, train__samples_every=4)
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        silent.listen(50)
        port = silent.getsockname()[1]
        uri = f'http://127.0.0.1:{port}'
        monkeypatch.setenv('MLFLOW_TRACKING_URI', uri)
        assert worker(ws, MLFLOW_TRACKING_URI=uri).exitcode == 0 and not sent(ws)
        first = trained(ws)
        assert [e['event'] for e in events(ws)][-1] == 'done'
    with mlflow_server(tmp_path, port):
        open_workspace(ws.root, overrides={'train.lr': 0.001})
        assert worker(ws, MLFLOW_TRACKING_URI=uri).exitcode == 0
        end = time.time() + 120
        while not sent(ws):
            assert time.time() < end, [f.read_text()[-500:] for f in ws.work.glob('train-*/tracking.log')]
            time.sleep(0.2)
        client = mlflow_client(ws.root)
        exp = client.get_experiment_by_name(experiment_name(ws))
        runs = {r.data.params['train.lr']: r for r in client.search_runs([exp.experiment_id])}
        assert set(runs) == {'0.002', '0.001'} and {r.info.status for r in runs.values()} == {'FINISHED'}
        for lr, said in (('0.002', first), ('0.001', trained(ws))):
            run = runs[lr]
            history = client.get_metric_history(run.info.run_id, 'train/loss')
            assert [m.step for m in history] == list(range(1, 9)) and history[-1].value == pytest.approx(
                said['loss_curve'][-1][1]
            )
            assert {
                'train/grad_norm',
                'train/lr',
                'train/t0050',
                'train/samples_per_second',
                'train/memory_gb',
                'validation/loss',
                'validation/t0050',
                'validation/t0950',
            } <= set(run.data.metrics)
            assert (
                run.data.metrics['validation/loss'] == pytest.approx(said['validation']['loss'])
                and run.data.tags['data'] == said['data']
            )
            assert 0 < run.data.metrics['train/memory_gb'] < 24
        artifacts = {
            k: len(client.list_artifacts(runs['0.002'].info.run_id, k)) for k in ('samples', 'guesses')
        }
        assert (
            artifacts == dict(samples=2, guesses=2)
            and len(list((tmp_path / 'artifacts').rglob('*.png'))) == 8
        )
        promote(ws.root)
        v = client.get_model_version_by_alias(experiment_name(ws), 'champion')
        assert v.tags['run_id'] == trained(ws)['run_id'] and v.run_id == runs['0.001'].info.run_id
        assert not (ws.root / 'mlflow.db').exists()
