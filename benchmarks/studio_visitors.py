"""The studio with visitors: time to the page and the first picture, twenty visitors at once, and a hostile
one.

    python benchmarks/studio_visitors.py [WORKSPACE] [--only page,load,harm] [--rounds 3] [--visitors 20]
        [--prompts 500]

WORKSPACE is a trained garden (default: garden). The page is opened in Chromium; three of the twenty
visitors use it, the others speak its protocol. Memory is the proportional set size (pages that processes
share are counted once) of the server, the generator and all kernels. It needs tests/ beside it.
"""

import argparse
import asyncio
import os
import random
import re
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / 'tests'))


@contextmanager
def served(workspace, rate=120):  # the server, its address
    from browser import free_port, start, stop

    port = free_port()
    server = start(workspace, port, rate=rate)
    try:
        line = server.stdout.readline()
        assert 'http://localhost' in line, line + server.stdout.read()
        yield server, f'http://127.0.0.1:{port}'
    finally:
        stop(server)
    print('the server said', server.stdout.read().strip()[:500] or 'nothing')


class Memory(threading.Thread):
    "GB by the second: of the server, the generator, all kernels."

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.root, self.seen = psutil.Process(pid), []
        self.start()

    def now(self):
        out = dict(server=0.0, generator=0.0, kernels=0.0, n=0)
        for p in [self.root, *self.root.children(recursive=True)]:
            try:
                words = ' '.join(p.cmdline())
                kind = (
                    'generator'
                    if 'flowerdiff.apps.generating' in words
                    else 'kernels'
                    if 'ipykernel' in words
                    else 'server'
                )
                out[kind] += p.memory_full_info().pss / 1e9
                out['n'] += kind == 'kernels'
            except psutil.Error:
                pass  # it has ended
        return out

    def run(self):
        while self.root.is_running():
            self.seen.append(self.now())
            time.sleep(1)

    def peak(self):
        return max(sum(s[k] for k in ('server', 'generator', 'kernels')) for s in self.seen)


def opened(browser, url):  # a page, seconds until it can be used, until its model is there
    from browser import open_page

    began = time.perf_counter()
    page = open_page(browser, url)
    page.get_by_role('button', name='Generate', exact=True).wait_for()
    usable = time.perf_counter() - began
    page.get_by_text('Ready.').wait_for()
    return page, usable, time.perf_counter() - began


def drawn(page):  # seconds from the click to the newest picture
    n = page.locator('.fd-card').count()
    began = time.perf_counter()
    page.get_by_role('button', name='Generate', exact=True).click()
    page.locator('.fd-card').nth(n).locator('img').first.evaluate('e => e.decode()')
    return time.perf_counter() - began


def pages(workspace, rounds):
    from browser import BROWSER, FLAGS
    from playwright.sync_api import sync_playwright

    rows = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        browser.new_page().goto('about:blank')
        for _ in range(rounds):
            before = time.perf_counter()
            with served(workspace) as (_, url):
                up = time.perf_counter() - before
                page, usable, ready = opened(browser, url)
                first, second = drawn(page), drawn(page)
                rows.append((up, usable, ready, first, second, *opened(browser, url)[1:]))
        browser.close()
    names = (
        'command to server up',
        'up to a page that can be used',
        'up to "Ready."',
        'click to the first picture',
        'to the second',
        'second visitor: page',
        'second visitor: "Ready."',
    )
    print(f'| {rounds} rounds | median | range |\n|---|---|---|')
    for name, seen in zip(names, zip(*rows)):
        print(f'| {name} | {statistics.median(seen):.1f} s | {min(seen):.1f} to {max(seen):.1f} s |')


async def visit(url, i, rng, words):  # what a visitor met with
    from protocol_page import Full, ProtocolPage

    began = time.perf_counter()
    out = dict(opened=0, drawn=[], refused=[], full=False)
    try:
        page = await ProtocolPage(url).open()
    except Full:
        return dict(out, full=True)
    out['opened'] = time.perf_counter() - began
    for _ in range(3):
        page.set('Pictures', rng.randint(1, 4))
        began = time.perf_counter()
        said = await page.draw(rng.choice(words))
        took = time.perf_counter() - began
        out['drawn' if re.match(r'\d pictures? in', said) else 'refused'].append(
            took if re.match(r'\d pictures? in', said) else said
        )
        await asyncio.sleep(rng.random())
    return dict(out, page=page)


async def load(server, url, n):
    from protocol_page import Full, ProtocolPage

    memory, rng = Memory(server.pid), random.Random(0)
    browsers = threading.Thread(target=three_browsers, args=(url, seen := [], done := threading.Event()))
    browsers.start()
    met = await asyncio.gather(
        *(
            visit(
                url,
                i,
                rng,
                [
                    'a red rose under a blue sky',
                    'three pink tulips',
                    'a yellow sunflower in a meadow',
                    'a white daisy at sunset',
                ],
            )
            for i in range(n - 3)
        )
    )
    while len(seen) < 3 and browsers.is_alive():
        await asyncio.sleep(0.5)
    try:
        await ProtocolPage(url).open()
        late = 'was let in'
    except Full:
        late = 'was told to wait'
    served, drawn, refused = (
        [m for m in met if not m['full']],
        [t for m in met for t in m['drawn']],
        [s for m in met for s in m['refused']],
    )
    busiest = memory.now()
    done.set()
    await asyncio.to_thread(browsers.join)
    for m in served:
        await m['page'].leave()
    await asyncio.sleep(5)
    after = memory.now()
    opened = [m['opened'] for m in served]
    print(
        f'{len(served)} of {n - 3} protocol visitors let in,'
        f' pages after {min(opened):.1f} to {max(opened):.1f} s;'
        f' {len(drawn)} requests generated in {statistics.median(drawn):.1f} s'
        f' (median; at most {max(drawn):.1f}),'
        f' {len(refused)} refused {set(refused)}'
    )
    print(f'three in Chromium: {seen}; one more, when {busiest["n"]} kernels ran, {late}')
    print('| | server | generator | kernels | together |\n|---|---|---|---|---|')
    for name, m in (('everyone there', busiest), ('after they left', after)):
        together = m['server'] + m['generator'] + m['kernels']
        kernels = f'{m["n"]}: {m["kernels"]:.2f} GB'
        print(f'| {name} | {m["server"]:.2f} GB | {m["generator"]:.2f} GB | {kernels} | {together:.2f} GB |')
    print(f'peak {memory.peak():.2f} GB')


def three_browsers(url, seen, done):  # three of the visitors, who stay
    from browser import BROWSER, FLAGS
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        for _ in range(3):
            page, usable, _ = opened(browser, url)
            seen.append(f'page {usable:.1f} s, picture {drawn(page):.1f} s')
        done.wait(600)


async def harmed(server, url, n):
    from protocol_page import ProtocolPage, answers
    from test_visitors import children

    page = await ProtocolPage(url).open()
    await page.until(lambda: page.said() == 'Ready.')
    before, memory, seen, rng = children(server), [], {}, random.Random(0)
    for i in range(n):
        answer = await answers(page, i, rng)
        seen[answer] = seen.get(answer, 0) + 1
        if i % 10 == 9:
            memory.append(
                (
                    i,
                    *(
                        sum(p.memory_info().rss for p in some) / 1e6
                        for some in ([psutil.Process(server.pid)], before[0:1], before[1])
                    ),
                )
            )
    assert children(server) == before and server.poll() is None, 'a process was started anew'
    late = [m for m in memory if m[0] >= n / 5]
    print(f'{n} prompts: {seen}; the same processes')
    for k, name in enumerate(('server', 'generator', 'kernel'), 1):
        slope = statistics.linear_regression([m[0] for m in late], [m[k] for m in late]).slope
        print(
            f'{name}: {memory[0][k]:.0f} MB at first, {late[0][k]:.0f} after {late[0][0] + 1},'
            f' {late[-1][k]:.0f} at the end; {slope * 1000:.1f} MB in a thousand'
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('workspace', nargs='?', default='garden', type=Path)
    parser.add_argument('--only', default='page,load,harm')
    for name, n in (('rounds', 3), ('visitors', 20), ('prompts', 500)):
        parser.add_argument(f'--{name}', type=int, default=n)
    args = parser.parse_args()
    workspace = args.workspace.absolute()
    print(f'load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')
    if 'page' in args.only:
        pages(workspace, args.rounds)
    for name, do, n, rate in (
        ('load', load, args.visitors, 120),
        ('harm', harmed, args.prompts, 10**6),
    ):  # who means harm is not to be stopped by the rate alone
        if name in args.only:
            with served(workspace, rate) as (server, url):
                asyncio.run(do(server, url, n))
    print(f'load {os.getloadavg()[0]:.1f}')


if __name__ == '__main__':
    main()
