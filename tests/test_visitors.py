"""Many visitors: one generator draws for all, each gets their own picture or one line.

A tiny random model draws; its pictures are compared with the Generator's own, pixel by pixel.
The comment at the start of a test names the changes to the program that it would notice."""

import asyncio
import html
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

import browser as browser_module
import numpy as np
import psutil
import pytest
from browser import (
    ENV,
    browser_fixture,  # noqa: F401
    browser_only,
    draw,
    fill,
    free_port,
    newest,
    open_page,
    shot,
    start,
    stop,
)
from protocol_page import ODD, Full, ProtocolPage, answers
from test_space import health, well

from flowerdiff.apps.remote import (
    QueuePosition,
    RemoteSession,
    RemoteStep,
    SocketConnection,
    WorkerSupervisor,
)
from flowerdiff.apps.session import GenerationRequest, GenerationSession
from flowerdiff.core.schema import UserError
from flowerdiff.core.workspace import Cancelled


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    from tiny import tiny_model

    folder = tmp_path_factory.mktemp('visitors') / 'meadow'
    tiny_model(folder / 'model')
    return folder


@pytest.fixture(scope='module')
def supervisor(workspace):
    before, os.environ['OMP_NUM_THREADS'] = os.environ.get('OMP_NUM_THREADS'), '1'
    supervisor = WorkerSupervisor(workspace)
    ready = RemoteSession(workspace, supervisor.socket)
    ready.ready.wait()
    assert not ready.error
    yield supervisor
    supervisor.close()
    os.environ.pop('OMP_NUM_THREADS') if before is None else os.environ.update(OMP_NUM_THREADS=before)


def own(workspace, requests):  # the Generator's pictures of them, in a process with as many threads
    code = (
        'import json, numpy as np; from flowerdiff import Generator; '
        f"g = Generator.from_pretrained({str(workspace)!r}, 'torch')\n"
        f"np.save({str(workspace / 'own.npy')!r}, np.stack([np.array(g(w['prompt'], seed=w['seed'], "
        "num_inference_steps=w['num_inference_steps'], guidance_scale=w['guidance_scale'])[0]) "
        f'for w in json.loads({json.dumps([vars(w) for w in requests])!r})]))'
    )
    subprocess.run([sys.executable, '-c', code], check=True, env=ENV)
    return np.load(workspace / 'own.npy')


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'it never came'
        time.sleep(0.1)


class Visitor(threading.Thread):
    "Asks for a picture, and keeps what it hears."

    def __init__(self, workspace, supervisor, request, stop=lambda heard: False):
        super().__init__(daemon=True)
        self.session, self.request, self.heard, self.pictures, self.said, self.stop = (
            RemoteSession(workspace, supervisor.socket),
            request,
            [],
            [],
            '',
            stop,
        )
        self.start()

    def run(self):
        try:
            self.pictures = self.session.generate(self.request, self._on_step)
        except UserError as e:
            self.said = str(e)
        except Cancelled:
            self.said = 'Cancelled'

    def _on_step(self, x):
        self.heard.append(x)
        return not self.stop(x)

    @property
    def places(self):
        return [x.position for x in self.heard if isinstance(x, QueuePosition)]

    def until(self, test):  # something that it hears
        for _ in range(10_000):
            if any(test(x) for x in list(self.heard)):
                return self
            time.sleep(0.02)
        raise AssertionError(f'never heard; only {self.heard[-3:]} {self.said}')


LONG = GenerationRequest('a red rose', num_inference_steps=100, num_images_per_prompt=8)
drawing, waits = (
    lambda x: isinstance(x, RemoteStep),
    lambda x: isinstance(x, QueuePosition) and x.position > 0,
)


def test_thirty_at_once(workspace, supervisor):
    "Breaks when more than twenty may wait, places do not fall, or a visitor gets another one's picture."
    # a queue without an end; a queue that is not in order; pictures handed to another job
    words = ['red', 'blue', 'white', 'yellow', 'rose', 'iris', 'daisy', 'sky', 'meadow', 'under']
    busy = Visitor(workspace, supervisor, LONG).until(drawing)
    requests = [
        GenerationRequest(f'a {words[i % 10]} {words[i % 7]}', seed=i, num_inference_steps=6)
        for i in range(30)
    ]
    visitors = [Visitor(workspace, supervisor, w) for w in requests]
    for v in [busy, *visitors]:
        v.join(200)
    served = [(w, v) for w, v in zip(requests, visitors) if v.pictures]
    assert len(busy.pictures) == 8 and len(served) >= 20 and all(len(v.pictures) == 1 for _, v in served)
    refused = [v.said for v in visitors if not v.pictures]
    assert refused and all('The queue is full' in s and 'later' in s and '\n' not in s for s in refused), (
        refused
    )
    for _, v in served:
        assert v.places == sorted(v.places, reverse=True), v.places
    assert max(v.places[0] for _, v in served) >= 18
    assert np.array_equal(
        own(workspace, [w for w, _ in served]), np.stack([np.array(v.pictures[0]) for _, v in served])
    )


def test_cancelling_while_waiting_and_while_drawn(workspace, supervisor):
    # a `leave` that keeps the job in the queue; a drawing that does not stop when its job is gone
    began = time.monotonic()
    Visitor(workspace, supervisor, LONG).join()
    whole = time.monotonic() - began
    go = threading.Event()
    first = Visitor(workspace, supervisor, LONG, lambda x: go.is_set()).until(drawing)
    second = Visitor(workspace, supervisor, LONG, waits)
    second.join(30)
    third = Visitor(workspace, supervisor, GenerationRequest('a rose', num_inference_steps=2)).until(waits)
    assert second.said == 'Cancelled' and third.places[0] == 1
    go.set()
    began = time.monotonic()
    first.join(30)
    third.join(30)
    assert first.said == 'Cancelled' and third.pictures and time.monotonic() - began < 0.7 * whole


def test_who_vanishes_leaves_a_place(workspace, supervisor):
    "Breaks when the requests of twenty-one closed connections still fill the queue."
    # no `on_connection_close`
    lines = []
    for i in range(21):
        line = SocketConnection(supervisor.socket)
        lines.append(line)
        answer = line.ask('/generate', dict(client=f'ghost {i}', request=vars(LONG)))
        assert answer.status == 200 and answer.readline()
        if i == 0:
            time.sleep(0.3)  # until it is drawn
    with pytest.raises(UserError, match='The queue is full'):
        RemoteSession(workspace, supervisor.socket).generate(LONG)
    for line in lines:
        line.sock.close()
        line.close()
    del lines, line, answer
    for _ in range(40):
        late = Visitor(workspace, supervisor, GenerationRequest('a rose', num_inference_steps=2))
        late.join(30)
        if late.pictures:
            break
        time.sleep(0.1)  # hanging up takes a moment
    assert late.pictures and max(late.places) <= 2, late.said


def hostile(i, rng):  # the body of a request
    odd = [
        '',
        ' ',
        '\0',
        'rose\0iris',
        '<script>alert(1)</script>',
        '<img src=x onerror=alert(1)>',
        '🌸' * rng.randrange(1, 600),
        '%s%n%x' * 9,
        '{0.__class__}',
        '\u202eesor a',
        'וורד אדום',
        '../../etc/passwd',
        '; rm -rf /',
        "' OR 1=1 --",
        '\ud800',
        '\ufffd',
        'x' * 501,
        'rose ' * 99,
        'a\u0301' * 250,
        '\x1b[31mred',
        '$(reboot)',
        'null',
        '\uffff' * 9,
        'ﷺ' * 400,
        rng.randbytes(200).decode('latin1'),
    ]
    wild = [None, True, [], {}, 7, -1, 1e309, 10**30, 'a rose', [['a rose']], {'prompt': 'a rose'}]
    kind = i % 5
    if kind < 2:
        return json.dumps(
            dict(
                client=f'w{i}',
                request=dict(
                    prompt=rng.choice(odd), negative_prompt=rng.choice(odd), num_inference_steps=2, seed=i
                ),
            )
        ).encode()
    if kind == 2:
        return json.dumps(
            dict(
                client=rng.choice([f'w{i}', *wild]),
                request={
                    **vars(GenerationRequest('a rose', num_inference_steps=2)),
                    rng.choice([*vars(GenerationRequest('')), 'size']): rng.choice([*wild, rng.choice(odd)]),
                },
            )
        ).encode()
    if kind == 3:
        return rng.randbytes(rng.randrange(1, 3000))
    return rng.choice(
        [
            b'',
            b'[' * 60_000,
            b'{"client": "a", "request": ' + b'9' * 50_000 + b'}',
            json.dumps(rng.choice(wild)).encode(),
            b'x' * (10_000_000 if i % 50 == 4 else 70_000),
            b'{"client":"a"',
            json.dumps(dict(client='x' * 999, request=dict(prompt='a rose'))).encode(),
        ]
    )


def sent(supervisor, body):  # (status, last line); status 0: hung up, as on what is too large
    line = SocketConnection(supervisor.socket)
    try:
        line.request('POST', '/generate', body)
        answer = line.getresponse()
        lines = answer.read().decode().strip().splitlines()
        return answer.status, lines[-1] if lines else ''
    except (OSError, HTTPException):
        return 0, ''
    finally:
        line.close()


def test_five_hundred_hostile_requests(workspace, supervisor):
    "Each is drawn or refused in a line, by the process that was there before, and it does not grow."
    # `request_of` without its check of types; `check` that repeats a name as it came;
    # JSON's RecursionError not caught; a list that keeps all jobs; no `max_body_size`
    process, rng, seen = psutil.Process(supervisor.process.pid), random.Random(0), []
    for i in range(500):
        if i == 50:
            early = process.memory_info().rss
        seen.append(sent(supervisor, body := hostile(i, rng)))
        status, last = seen[-1]
        if status == 200:
            said = json.loads(last)
            assert said.keys() & {'pictures', 'error'} and '\n' not in said.get('error', ''), (
                body[:200],
                last[:200],
            )
        elif status in (400, 429, 503) and last:
            assert '\n' not in json.loads(last)['error'] and len(last) < 300, (body[:200], last)
        else:
            assert status in (0, 400) and len(body) > 2**16, (status, body[:200], last)
    assert process.is_running() and not supervisor.dead and process.memory_info().rss - early < 30e6, (
        early,
        process.memory_info().rss,
    )
    kinds = [s for s, _ in seen]
    assert {0, 200, 400} >= set(kinds) and kinds.count(200) > 50 and kinds.count(400) > 200
    assert np.array_equal(
        own(workspace, [w := GenerationRequest('a red rose', seed=3)])[0],
        np.array(RemoteSession(workspace, supervisor.socket).generate(w)[0]),
    )


def test_the_socket_is_ours_alone(supervisor):
    # `bind_unix_socket` with its own mode; a socket in a folder that all share
    assert (
        stat.S_IMODE(os.stat(supervisor.socket).st_mode) == 0o600
        and stat.S_IMODE(os.stat(Path(supervisor.socket).parent).st_mode) == 0o700
    )


def test_a_generator_that_keeps_dying_is_left_alone(tmp_path):
    # `look` that does not count
    supervisor = WorkerSupervisor(tmp_path, max_restarts=2)
    pids = {supervisor.process.pid}
    for _ in range(4):
        supervisor.process.kill()
        supervisor.process.wait()
        supervisor.restart_if_dead()
        pids.add(supervisor.process.pid)
    assert supervisor.dead and len(pids) == 3
    with pytest.raises(UserError, match='does not answer'):
        RemoteSession(tmp_path, supervisor.socket, timeout=0.3).generate(GenerationRequest('a rose'))
    supervisor.close()


def test_a_backend_that_fails_midway(workspace, tmp_path):
    "PyTorch draws the request instead, says so, and the page's row of steps starts again."
    # a queue that sends pictures without their note (two calls are the warm-up's);
    # first steps, or those of the row of previews, that are not always reported
    code = f"""
import flowerdiff.inference.backends as b; from flowerdiff.apps.generating import main
real, calls = b.load_backend, []
def load(where, name='auto'):
    out = real(where, 'torch'); denoise = out.denoise
    def fails(*args):
        calls.append(1)
        if len(calls) == 5: raise RuntimeError('a kernel of the runtime failed')
        return denoise(*args)
    if name == 'auto': out.name, out.denoise = 'onnx', fails
    return out
b.load_backend = load; main({str(workspace)!r}, {str(tmp_path / 's')!r})"""
    with subprocess.Popen([sys.executable, '-c', code], env=ENV, stdin=subprocess.PIPE) as process:
        session, request, heard = (
            RemoteSession(workspace, str(tmp_path / 's')),
            GenerationRequest('a blue iris', seed=5, num_inference_steps=6, num_previews=6),
            [],
        )
        picture = session.generate(request, heard.append)[0]
        assert (
            picture.info['note'] == 'ONNX Runtime failed (RuntimeError: a kernel of the runtime failed); '
            'PyTorch was used instead'
        )
        steps = [x.step for x in heard if isinstance(x, RemoteStep)]
        assert steps == [1, 2, 1, 2, 3, 4, 5, 6] and len(heard[-1].preview(96)) == 1
        assert (
            np.array_equal(own(workspace, [request])[0], np.array(picture))
            and 'note' not in session.generate(request)[0].info
        )
        process.stdin.close()
        process.wait(20)


def test_every_field_of_a_request(workspace, supervisor):
    "Breaks when sampler or backend is not as asked, or a missing model is more than one line."
    # a queue whose session is given only words, seed and steps; an error that ends the process
    session, request = (
        RemoteSession(workspace, supervisor.socket),
        GenerationRequest('a red rose', seed=2, num_inference_steps=6, backend='torch'),
    )
    plain, euler = (np.array(session.generate(w)[0]) for w in (request, replace(request, scheduler='euler')))
    assert np.abs(plain.astype(int) - euler).mean() > 0.5
    assert (
        'PyTorch was used instead' in session.generate(replace(request, backend='tensorrt'))[0].info['note']
    )
    with pytest.raises(UserError, match='Student: this workspace has no such model'):
        session.generate(replace(request, model='student'))
    assert (
        np.array_equal(np.array(session.generate(request)[0]), plain)
        and session.choices() == GenerationSession(workspace).choices()
    )


# ---- pages without a browser


class Public:
    "A server as on the Hub, for eight visitors behind a proxy, and who comes to it."

    def __init__(self, workspace):
        self.loop = asyncio.new_event_loop()
        port = free_port()
        self.server = start(workspace, port, visitors=8, rate=12, proxied=True)
        self.url = f'http://127.0.0.1:{port}'
        line = self.server.stdout.readline()
        assert 'http://localhost' in line, line + self.server.stdout.read()

    def run(self, coroutine):
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 300))

    def visit(self, address=None):
        return self.run(self.page(address))

    def page(self, address=None):
        return ProtocolPage(self.url, {'X-Forwarded-For': address} if address else {}).open()


@pytest.fixture(scope='module')
def public(workspace):
    public = Public(workspace)
    well(public.url)
    public.early, public.began = public.visit(), time.monotonic()
    yield public
    stop(public.server)
    assert 'Traceback' not in (said := public.server.stdout.read()), said
    public.loop.close()


def test_seven_at_once_and_one_too_many(public):
    "Breaks when a visitor too many is let in, or kernels are large, unbounded or outlive their pages."

    # one session of a page for all; no `prlimit`; kernels that load the model;
    # a `start_kernel` without its count
    async def visitor(i):
        page = await public.page()
        said = [await page.draw(f'a rose {i}'), await page.draw(f'an iris {i}')]
        assert (
            all(s.startswith('1 picture in') for s in said)
            and len(page.cards()) == 2
            and f'a rose {i}' in page.cards()[0] + page.cards()[1]
        ), said
        return page

    async def all_of_them():
        return await asyncio.gather(*map(visitor, range(7)))

    pages = public.run(all_of_them())
    _, kernels = children(public.server)
    assert len(kernels) == 8 and all(
        p.memory_info().rss < 200e6 and resource.prlimit(p.pid, resource.RLIMIT_DATA)[0] == 2**29
        for p in kernels
    )
    with pytest.raises(Full):
        public.visit()
    for page in pages:
        public.run(page.leave())
    for _ in range(100):
        if len(children(public.server)[1]) == 1:
            break
        time.sleep(0.1)
    assert len(children(public.server)[1]) == 1


def test_one_address_does_not_take_all_places(public):
    "Of eight places four: then its fifth page is told to wait, and another user from elsewhere comes in."
    # no `homes`
    four = [public.visit('203.0.114.9') for _ in range(4)]
    with pytest.raises(Full):
        public.visit('203.0.114.9')
    for page in [*four, public.visit('8.8.4.4')]:
        public.run(page.leave())
    wait_until(lambda: len(children(public.server)[1]) == 1)


def test_a_reload_does_not_evade_the_rate(public):
    "Breaks when a reload or a forged address evades the limit, or one address uses up that of another."

    # a count by page; the first address of X-Forwarded-For; an address that does not reach the generator
    def ask(address, n):
        page = public.visit(address)
        page.set('Pictures', n)
        said = public.run(page.draw())
        public.run(page.leave())
        return said

    assert ask('8.8.4.4', 8).startswith('8 pictures') and 'The limit is 12 pictures per minute' in ask(
        '1.1.1.1, 8.8.4.4', 8
    )
    assert ask('8.8.4.4, 1.1.1.1, 10.16.3.80', 1).startswith('1 picture')


def test_hostile_messages_through_the_page(public):
    "Breaks when a message ends a process, gets no answer, or is shown as HTML."
    # no `is_message`, or one without its count: the server makes a list of 2**64;
    # a message type that Voila does not allow; `figure` without its escape
    page, rng, before = public.visit('9.9.9.9'), random.Random(1), children(public.server)

    async def as_words():  # every one with HTML in it is drawn and shown as what it is
        for text in (t for t in ODD if '<' in t):
            page.set('Steps', 2)
            page.set('Prompt', text)
            said = await page.draw(seconds=120)
            assert (
                said.startswith('1 picture in')
                and html.escape(text, quote=True) in ''.join(page.cards())
                and text not in ''.join(page.values())
            ), said

    public.run(as_words())

    async def all_of_them():
        return [await answers(page, i, rng) for i in [*range(24), *range(31, 120, 8)]]

    seen = public.run(all_of_them())
    assert (
        {'picture', 'line', 'cut off'} == set(seen)
        and children(public.server) == before
        and health(public.url)[0] == 200
    )
    public.run(page.leave())


def test_tabs_of_a_page_take_turns(public):
    "What is asked for in two tabs is drawn one after the other: neither is refused because of the other."
    # no `turn`: "the last request is still waiting"
    session = RemoteSession('nowhere', children(public.server)[0].cmdline()[4], timeout=5)
    done = []
    threads = [
        threading.Thread(
            target=lambda: done.append(session.generate(GenerationRequest('a rose', num_inference_steps=20)))
        )
        for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(done) == 4


def test_a_page_is_not_cut_off_by_the_servers_pings(public):
    # Jupyter's pings with a timeout as long as their interval: every connection ends after it
    public.run(asyncio.sleep(max(0, 33 - (time.monotonic() - public.began))))
    assert not public.early.reader.done() and public.run(public.early.draw('a rose')).startswith('1 picture')


# ---- pages


def children(server):  # the generator, and the kernels
    found = [
        (p, ' '.join(p.cmdline()))
        for p in psutil.Process(server.pid).children(recursive=True)
        if p.status() != 'zombie'
    ]
    return next(p for p, c in found if 'flowerdiff.apps.generating' in c), [
        p for p, c in found if 'ipykernel' in c
    ]


@pytest.fixture(scope='module')
def served(workspace):
    with browser_module.served(workspace) as both:
        yield both


@pytest.fixture(scope='module')
def pages(browser, served):
    well(served[1])
    pages = [open_page(browser, served[1]) for _ in range(3)]
    for p in pages:
        p.get_by_text('Ready.').wait_for()
        p.get_by_role('button', name='Lock').click()
    return pages


@browser_only
def test_three_pages_at_once(pages, served, workspace):
    "Each has its own picture, and none has the model."
    # `show` that makes a GenerationSession; a module of the page that imports torch
    for i, p in enumerate(pages):
        fill(p, 'Prompt', 'a red rose')
        fill(p, 'Seed', 40 + i)
    for p in pages:
        p.get_by_role('button', name='Generate', exact=True).click()
    for p in pages:
        p.locator('.fd-card').first.wait_for()
    assert np.array_equal(
        own(workspace, [GenerationRequest('a red rose', seed=40 + i) for i in range(3)]),
        np.stack([np.array(newest(p)) for p in pages]),
    )
    generator, kernels = children(served[0])

    def has(p):
        return 'libtorch' in Path(f'/proc/{p.pid}/maps').read_text(encoding='utf-8')

    assert has(generator) and len(kernels) == 3 and not any(map(has, kernels))
    assert all(p.memory_info().rss < 200e6 for p in kernels), [p.memory_info().rss / 1e6 for p in kernels]


@browser_only
def test_a_page_is_told_its_place(pages):
    # `_waiting` that says nothing
    for p, steps in zip(pages, ('End', 'End', None)):
        if steps:
            slider = p.locator('.fd-controls').get_by_role('slider')
            slider.nth(0).focus()
            p.keyboard.press('End')
            slider.nth(1).focus()
            p.keyboard.press('End')
        p.get_by_role('button', name='Generate', exact=True).click()
    pages[2].get_by_text('ahead of you').wait_for()
    shot(pages[2], 'place')
    for p in pages[:2]:
        p.get_by_role('button', name='Cancel').click()
        p.get_by_text('Canceled.').wait_for()
    pages[2].get_by_text('1 picture in').wait_for()


@browser_only
def test_a_generator_that_is_killed(pages, served):
    "The page says one line; the server starts another one, and the next request is drawn."
    # no `look`; a page that shows the error of its connection
    page, (generator, _) = pages[0], children(served[0])
    page.get_by_role('button', name='Generate', exact=True).click()
    page.locator('.fd-status').get_by_text('Step').wait_for()
    generator.kill()
    page.get_by_text('is restarting').wait_for()
    shot(page, 'killed')
    assert page.locator('.fd-status.bad').inner_text().count('\n') == 0
    draw(pages[2], 'a blue iris', 3)  # waits until the model is there again
    assert children(served[0])[0].pid != generator.pid and 'of 20 visitors' in well(served[1])


@browser_only
@pytest.mark.parametrize('how', ['its page was closed elsewhere', 'it died'])
def test_a_page_whose_kernel_is_gone_says_so(pages, served, how):
    # no script in the template: Generate is pressed, and nothing happens;
    # a restarter, which starts a kernel without a page and without its bounds
    page = pages[1]
    kernel = page.evaluate("JSON.parse(document.getElementById('jupyter-config-data').textContent).kernelId")
    if how == 'it died':
        (process,) = [p for p in children(served[0])[1] if any(kernel in word for word in p.cmdline())]
        process.kill()
        wait_until(
            lambda: page.evaluate('id => fetch(`/api/kernels/${id}`).then(r => r.status)', kernel) == 404
        )
    else:
        page.evaluate("id => fetch(`/voila/api/shutdown/${id}`, {method: 'POST'})", kernel)
    page.get_by_role('button', name='Generate', exact=True).click()
    page.get_by_role('alert').get_by_text('This page has ended').wait_for()
    shot(page, 'gone')
    page.get_by_role('button', name='Open it again').click()
    page.get_by_text('Ready.').wait_for()


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_generator_ends_with_the_server(tmp_path, how):
    # no `end_with_parent`
    server = start(tmp_path / 'w', port := free_port())
    assert 'http://localhost' in server.stdout.readline()
    assert health(f'http://127.0.0.1:{port}') == (503, 'no model in w\n')
    generator, _ = children(server)
    folder = Path(generator.cmdline()[4]).parent
    assert folder.is_dir()
    server.send_signal(how)
    server.wait(30)
    for _ in range(100):
        if not folder.exists() and not generator.is_running():
            break
        time.sleep(0.1)
    assert not folder.exists() and not (generator.is_running() and generator.status() != 'zombie')
