"A studio that is served, and a browser that looks at it: what the tests of pages share."

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
BROWSER = next(
    (
        p
        for p in ('/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome')
        if os.path.exists(p)
    ),
    None,
)
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]
PATIENCE = 200_000  # milliseconds: test machines are busy
GARDEN = os.environ.get('FLOWERDIFF_TEST_GARDEN')
ENV = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
browser_only = pytest.mark.skipif(
    BROWSER is None,
    reason='no Chromium here: apt-get install -y --no-install-recommends chromium fonts-dejavu-core',
)

# ---- a server


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


# a background shell ignores Ctrl-C
HEARS = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler); '


def start(workspace, port, **options):
    "Serve the studio of a workspace in a process of its own. The options go to `serve`."
    arguments = ', '.join(f'{name}={value!r}' for name, value in dict(options, port=port).items())
    code = HEARS + f'from flowerdiff.apps.serving import serve; serve({str(workspace)!r}, {arguments})'
    return subprocess.Popen(
        [sys.executable, '-c', code],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stop(server):
    server.send_signal(signal.SIGINT)
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)


@contextmanager
def served(workspace):  # the server, and its address once it listens
    server = start(workspace, port := free_port())
    try:
        line = server.stdout.readline()
        assert 'http://localhost' in line, line + server.stdout.read()
        yield server, f'http://127.0.0.1:{port}'
    finally:
        stop(server)


def children(server, name):  # its processes with a word of their command line
    import psutil

    return [
        p
        for p in psutil.Process(server.pid).children(recursive=True)
        if any(name in word for word in p.cmdline())
    ]


def kernels(server):
    return sorted(
        children(server, 'ipykernel'), key=lambda p: p.create_time()
    )  # of its visitors, the first one first


# ---- a browser


@contextmanager
def chromium(*flags):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=BROWSER, args=[*FLAGS, *flags])
        yield b
        b.close()


@pytest.fixture(scope='module', name='browser')
def browser_fixture():
    with chromium() as b:
        yield b


@pytest.fixture(scope='module', name='studio')
def studio_fixture(workspace):  # the module's own workspace
    with served(workspace) as running:
        yield running


def shot(page, name):
    if folder := os.environ.get('FLOWERDIFF_TEST_SHOTS'):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f'{folder}/{name}.png', full_page=True)


def open_page(browser, url, **kind):
    page = browser.new_context(**{**dict(viewport=dict(width=1200, height=900)), **kind}).new_page()
    page.set_default_timeout(PATIENCE)
    page.foreign, page.said = [], []
    page.on('console', lambda m: page.said.append(m.text))
    page.on('pageerror', lambda e: page.said.append(str(e)))
    page.on(
        'request',
        lambda r: (
            page.foreign.append(r.url)
            if not re.match(r'https?://127\.0\.0\.1|wss?://127\.0\.0\.1|data:|blob:', r.url)
            else None
        ),
    )
    page.goto(url, timeout=PATIENCE)
    return page


def visitor(browser, url):  # a page whose seed stays
    page = open_page(browser, url)
    page.get_by_text('Ready.').wait_for()
    page.get_by_role('button', name='Lock').click()
    return page


# ---- what a person does there


def fill(page, label, value):
    page.get_by_label(label, exact=True).fill(str(value))
    page.keyboard.press('Tab')


def says(locator, value):  # waits until a field does
    from playwright.sync_api import expect

    expect(locator).to_have_value(str(value), timeout=PATIENCE)


def press(button):  # Enter on it, once it can be pressed: a button that cannot takes no focus
    from playwright.sync_api import expect

    expect(button).to_be_enabled(timeout=PATIENCE)
    button.press('Enter')


def draw(page, prompt=None, seed=None):
    "Press Draw; the newest picture as the page has it, when it is there."
    n = page.locator('.fd-card').count()
    if prompt is not None:
        fill(page, 'Prompt', prompt)
    if seed is not None:
        fill(page, 'Seed', seed)
    page.get_by_role('button', name='Generate', exact=True).click()
    page.locator('.fd-card').nth(n).or_(page.locator('.fd-status.bad')).first.wait_for()
    assert not page.locator('.fd-status.bad').count(), page.locator('.fd-status').inner_text()
    page.get_by_text(re.compile(r'pictures? in [\d.]+ s')).wait_for()
    return newest(page)


def picture(image):  # of an <img>
    assert image.evaluate('e => e.decode().then(() => e.naturalWidth)') > 0
    return Image.open(io.BytesIO(base64.b64decode(image.get_attribute('src').partition(',')[2])))


def newest(page):
    return picture(page.locator('.fd-card img').first)
