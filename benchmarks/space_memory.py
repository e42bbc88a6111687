"""Memory of a Space: the server, the generator process and the kernels.

Visitors come one after the other. Each generates four pictures and stays. The last one tries every
backend.

    python benchmarks/space_memory.py [--model FOLDER] [--visitors 2] [--onnx]

Makes the Space's folder and runs its start.py, as the Hub does. --model is a published model. Without it
a model of the size of flowers102's is made, with random weights: UNet 192, 384, 576 (148M), Stable
Diffusion's autoencoder, the text encoder of CLIP ViT-L/14 with its 49,408 words. --onnx adds its ONNX
files, which are then used. Needs Chromium.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

PORT = 7861
BROWSER = next(
    p
    for p in ('/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome')
    if os.path.exists(p)
)


class Peak(threading.Thread):
    "The peak memory of a process and its children, GB: resident, and with shared pages counted once."

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.root, self.rss, self.pss, self.kernels = psutil.Process(pid), 0, 0, 0

    def run(self):
        while self.root.is_running():
            now = []
            for p in [self.root, *self.root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):  # it has ended
                    now.append(p.memory_full_info())
            self.rss, self.pss, self.kernels = (
                max(self.rss, sum(m.rss for m in now) / 1e9),
                max(self.pss, sum(m.pss for m in now) / 1e9),
                len(now) - 2,
            )  # not the server and the generator
            time.sleep(0.2)


def large(folder: Path, onnx: bool):  # a published model of random weights
    from generate import full_size

    full_size(folder / 'made', 49408)
    (folder / 'made/model').rename(folder / 'model')
    if onnx:
        shutil.copytree(
            folder / 'made/onnx', folder / 'model/onnx', ignore=shutil.ignore_patterns('*fp16*', '*int8*')
        )
    shutil.rmtree(folder / 'made')
    return folder / 'model'


def make(model: Path, folder: Path) -> Path:  # the Space's folder
    from flowerdiff.apps.hf_space import make_space
    from flowerdiff.core.workspace import open_workspace, write_json

    ws = open_workspace(folder / 'w')
    write_json(
        ws.root / 'published.json', dict(repository='model', kind='folder', private=False, revision='1')
    )
    (ws.root / 'published').mkdir()
    (ws.root / 'published/model').symlink_to(model.absolute())
    return make_space(ws.root, folder / 'space')


def draw(page):  # four pictures
    n = page.locator('.fd-card').count()
    page.get_by_role('button', name='Generate', exact=True).click()
    page.locator('.fd-card').nth(n + 3).or_(page.locator('.fd-status.bad')).first.wait_for()
    assert not page.locator('.fd-status.bad').count(), page.locator('.fd-status').inner_text()
    page.get_by_text(re.compile(r'4 pictures in')).wait_for()


def arrive(page):
    page.goto(f'http://127.0.0.1:{PORT}')
    page.get_by_text('Ready.').wait_for()
    while (
        page.locator('.fd-controls .widget-readout').first.inner_text() != '4'
    ):  # a page that is just being built may miss a key
        page.locator('.fd-controls').get_by_role('slider').first.focus()
        page.keyboard.press('ArrowRight')
        page.wait_for_timeout(300)
    draw(page)


def others(page):  # every backend that it offers, twice over: what was closed is opened again
    for name in 2 * ('PyTorch', 'ONNX Runtime', 'OpenVINO'):
        if (button := page.get_by_role('button', name=name, exact=True)).is_enabled():
            button.click()
            draw(page)
            yield name


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', type=Path)
    parser.add_argument('--visitors', type=int, default=2)
    parser.add_argument('--onnx', action='store_true')
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    from playwright.sync_api import sync_playwright

    from flowerdiff.apps.hf_space import memory_for, open_models, visitors, weights_gb

    space = make(args.model or large(scratch, args.onnx), scratch)
    gb = weights_gb(space / 'model')
    limit = memory_for(gb)
    models = open_models(gb, limit)
    print(
        f'weights {gb:.2f} GB in 32 bits, {visitors(gb, limit, models)} visitors in {limit} GB,'
        f' open models: {models}, load {os.getloadavg()[0]:.1f}\n'
    )
    print('| visitors | resident, all processes | shared pages once |\n|---|---|---|')
    server = subprocess.Popen(
        [sys.executable, 'start.py'],
        cwd=space,
        env=dict(os.environ, PORT=str(PORT)),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        server.stdout.readline()  # it is up
        memory = psutil.Process(server.pid).memory_full_info()
        print(f'| 0 | {memory.rss / 1e9:.2f} GB | {memory.pss / 1e9:.2f} GB |')
        peak = Peak(server.pid)
        peak.start()
        with sync_playwright() as p:
            browser = p.chromium.launch(
                executable_path=BROWSER,
                args=['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking'],
            )
            for n in range(1, args.visitors + 1):
                page = browser.new_context().new_page()
                page.set_default_timeout(600_000)
                arrive(page)
                assert peak.kernels >= n, 'a kernel is missing'
                print(f'| {n} | {peak.rss:.2f} GB | {peak.pss:.2f} GB |', flush=True)
            for name in others(page):
                print(f'| the last one asks for {name} | {peak.rss:.2f} GB | {peak.pss:.2f} GB |', flush=True)
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        shutil.rmtree(scratch)


if __name__ == '__main__':
    main()
