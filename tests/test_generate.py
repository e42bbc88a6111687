"Drawing: the same pictures as stock Diffusers, the same picture in any company, and one line for every bad wish."

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model

import flowerdiff.inference.generator as sampler
import flowerdiff.inference.sampling_loop as sampling
from flowerdiff.core.schema import UserError
from flowerdiff.core.workspace import Cancelled
from flowerdiff.inference.backends import load_backend
from flowerdiff.inference.generator import Generator
from flowerdiff.inference.torch_backend import TorchBackend, cross_attentions
from flowerdiff.models.components import why_not_compile


def pixels(pictures):
    return np.stack([np.asarray(p, int) for p in pictures])


def same(a, b):
    "The bound of every promise about pixels: 99.9 % within 1 of 255, none off by more than 4."
    d = np.abs(pixels(a) - pixels(b))
    return (d <= 1).mean() >= 0.999 and d.max() <= 4


def with_tiny_autoencoder(folder):
    "Another autoencoder, another target: AutoencoderTiny and epsilon."
    from diffusers import AutoencoderTiny

    torch.manual_seed(1)
    shutil.rmtree(folder / 'vae')
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=0.7,
    ).save_pretrained(folder / 'vae')
    for name, change in (
        ('model_index.json', dict(vae=['diffusers', 'AutoencoderTiny'])),
        ('scheduler/scheduler_config.json', dict(prediction_type='epsilon')),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp('models')
    return dict(kl=tiny_model(root / 'kl'), tiny=with_tiny_autoencoder(tiny_model(root / 'tiny')))


@pytest.fixture(scope='module')
def generator(models):
    return Generator.from_pretrained(models['kl'])


@pytest.fixture(scope='module')
def stock(models):
    from diffusers import StableDiffusionPipeline

    pipes = {k: StableDiffusionPipeline.from_pretrained(v) for k, v in models.items()}

    def draw(kind, prompts, seed=0, **kw):
        pipe = pipes[kind]
        pipe.set_progress_bar_config(disable=True)
        if name := kw.pop('scheduler', None):
            import diffusers

            pipe = type(pipe)(
                **pipe.components
                | dict(scheduler=getattr(diffusers, name).from_config(pipe.scheduler.config)),
                requires_safety_checker=False,
            )
            pipe.set_progress_bar_config(disable=True)
        return pipe(
            prompts, generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))], **kw
        ).images

    return draw


@pytest.mark.parametrize('kind', ['kl', 'tiny'])
@pytest.mark.parametrize('guidance', [1.0, 4.0])
def test_draws_what_diffusers_draws(models, stock, kind, guidance):
    prompts = ['a red rose', 'the sky', 'a white daisy in the meadow']
    ours = Generator.from_pretrained(models[kind])(
        prompts, seed=5, num_inference_steps=6, guidance_scale=guidance, negative_prompt='blue'
    )
    theirs = stock(
        kind, prompts, 5, num_inference_steps=6, guidance_scale=guidance, negative_prompt=['blue'] * 3
    )
    assert pixels(ours).std() > 5 and same(ours, theirs)


@pytest.mark.parametrize('name', ['ddim', 'ddpm', 'unipc', 'euler', 'dpm', 'lcm'])
def test_every_scheduler_draws_what_diffusers_draws(generator, stock, name):
    ours = generator(['a red rose', 'the sky'], num_inference_steps=5, scheduler=name, guidance_scale=3.0)
    assert same(
        ours,
        stock(
            'kl',
            ['a red rose', 'the sky'],
            num_inference_steps=5,
            guidance_scale=3.0,
            scheduler=sampling.SCHEDULERS[name],
        ),
    )


@pytest.mark.parametrize('mutation', ['guidance', 'scaling', 'noise', 'order'])
def test_the_bound_notices_a_wrong_formula(models, stock, monkeypatch, mutation):
    "Were the comparison blind, it would not be a test."
    g = Generator.from_pretrained(models['tiny'])
    if mutation == 'guidance':
        monkeypatch.setattr(sampling, 'guide', lambda u, c, w: c + w * (c - u))
    if mutation == 'order':
        monkeypatch.setattr(sampling, 'guide', lambda u, c, w: c + w * (u - c))
    if mutation == 'scaling':
        g.backend.scaling *= 1.05
    if mutation == 'noise':
        monkeypatch.setattr(
            sampler, 'generators', lambda s, n: [torch.Generator().manual_seed(s) for _ in range(n)]
        )
    assert not same(
        g(['a red rose', 'the sky'], num_inference_steps=6, guidance_scale=4.0),
        stock('tiny', ['a red rose', 'the sky'], num_inference_steps=6, guidance_scale=4.0),
    )


def test_a_picture_does_not_depend_on_its_company(generator, models):
    many = generator(['a red rose', 'the sky'], num_images_per_prompt=3, seed=10, num_inference_steps=4)
    for i, prompt in ((0, 'a red rose'), (2, 'a red rose'), (4, 'the sky')):
        assert same([many[i]], generator(prompt, seed=10 + i, num_inference_steps=4))
    assert same(
        many,
        Generator(generator.backend, batch=4)(
            ['a red rose', 'the sky'], num_images_per_prompt=3, seed=10, num_inference_steps=4
        ),
    )


@pytest.mark.parametrize('name', list(sampling.SCHEDULERS))
def test_a_scheduler_goes_on_to_the_next_batch_as_if_new(generator, name):
    one, two = (
        Generator(generator.backend, batch=b)(
            'a red rose', num_images_per_prompt=2, num_inference_steps=5, scheduler=name
        )
        for b in (1, 2)
    )
    assert same(one, two) and not same(one[:1], one[1:])


def test_threads_do_not_disturb_each_other(generator):
    wishes = [
        ('a red rose', 4, None),
        ('the sky', 7, 'ddim'),
        ('a white daisy', 5, 'unipc'),
        ('an iris', 6, None),
    ]
    alone, together = [generator(p, num_inference_steps=s, scheduler=k, seed=3) for p, s, k in wishes], {}

    def visit(i):
        together[i] = [
            generator(wishes[i][0], num_inference_steps=wishes[i][1], scheduler=wishes[i][2], seed=3)
            for _ in range(2)
        ]

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(together) == [0, 1, 2, 3] and all(
        same(alone[i], p) for i, ps in together.items() for p in ps
    )


def test_one_text_pass_two_halves_a_step_one_decode(generator):
    calls = []

    class Counting:
        def __getattr__(self, name):
            value = getattr(generator.backend, name)
            if name not in ('encode', 'denoise', 'decode'):
                return value
            return lambda x, *a: (calls.append((name, len(x))), value(x, *a))[1]

    Generator(Counting())(['a red rose', 'the sky'], num_images_per_prompt=2, num_inference_steps=3)
    assert calls == [('encode', 3)] + [('denoise', 8)] * 3 + [('decode', 4)]
    calls.clear()
    Generator(Counting())('the sky', num_inference_steps=3, guidance_scale=1.0)
    assert [c for c in calls if c[0] == 'denoise'] == [('denoise', 1)] * 3
    calls.clear()
    Generator(Counting())('the sky', num_inference_steps=4, guidance_interval=(0.25, 0.75))
    assert [n for c, n in calls if c == 'denoise'] == [1, 2, 2, 1]


def test_a_text_is_read_once_and_few_are_kept(models):
    b, read = TorchBackend(models['kl'], 'cpu'), []
    text = b.text
    b.text = lambda ids: read.append(len(ids)) or text(ids)
    g = Generator(b)
    g('a red rose', num_inference_steps=1)
    g('a red rose', num_inference_steps=1)
    g(['an iris', 'a red rose'], num_inference_steps=1, negative_prompt='blue')
    assert read == [2, 2]  # with '', then the iris and 'blue'
    assert (
        torch.equal(b.encode(['a red rose']), torch.stack([b.known['a red rose'][0]]))
        and (
            b.encode(['the sky'])
            - text(
                b.tokenizer(['the sky'], padding='max_length', max_length=16, return_tensors='pt').input_ids
            )
        )
        .abs()
        .max()
        < 1e-5
    )
    threads = [
        threading.Thread(
            target=lambda i=i: [b.encode([f'{j} roses in {k}' for j in range(i)]) for k in range(20)]
        )
        for i in range(1, 6)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(b.known) == b.keep
    long = 'a red rose under the sky in the white yellow blue iris daisy sky sky meadow'
    for _ in range(2):
        with pytest.warns(UserWarning, match='longer than 16 tokens'):
            b.encode([long])


def products_asked(unet, draw):  # how often `draw` multiplies the text with a matrix
    asked = []
    hooks = [
        m.register_forward_hook(lambda *_: asked.append(1))
        for n, m in unet.named_modules()
        if n.endswith(('attn2.to_k', 'attn2.to_v'))
    ]
    made = draw()
    for h in hooks:
        h.remove()
    return made, len(asked), len(hooks)


def test_keys_and_values_of_the_text_are_made_once_a_drawing(generator, models):
    b = generator.backend
    _, asked, there = products_asked(b.unet, lambda: generator('a red rose', num_inference_steps=6))
    assert asked == there == 2 * len(b.readers) > 0
    text, z, t = b.encode(['a red rose', '', 'the sky']), torch.randn(3, 4, 16, 16), torch.tensor(321)
    made, told = b.denoise(z, t, text), b.denoise(z, t, b.condition(text))
    assert (made - told).abs().max() < 1e-5 < (made - b.denoise(z, t, b.condition(text.flip(0)))).abs().max()
    half = TorchBackend(models['kl'], 'cpu')
    half.unet.bfloat16()
    assert (
        half.condition(text)[0][0].dtype == torch.bfloat16
        and (half.denoise(z, t, half.condition(text)) - made).abs().max() < 0.05 * made.abs().max()
    )


@pytest.mark.parametrize('kind', ['none', 'only', 'other'])
def test_a_unet_that_reads_its_text_otherwise_or_not_at_all(models, tmp_path, kind):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    folder = Path(shutil.copytree(models['kl'], tmp_path / 'm'))
    torch.manual_seed(0)
    how = dict(
        none=dict(
            down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2, mid_block_type=None
        ),
        only=dict(only_cross_attention=True),
        other=dict(down_block_types=('SimpleCrossAttnDownBlock2D', 'DownBlock2D')),
    )[kind]
    UNet2DConditionModel(
        **dict(
            sample_size=16,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
            up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        | how
    ).save_pretrained(folder / 'unet')
    ours, pipe = (
        Generator.from_pretrained(folder, backend='torch'),
        StableDiffusionPipeline.from_pretrained(folder),
    )
    pipe.set_progress_bar_config(disable=True)
    assert not cross_attentions(ours.backend.unet)
    assert same(
        ours('a red rose', num_inference_steps=3, guidance_scale=3.0),
        pipe(
            'a red rose',
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
        ).images,
    )


@pytest.fixture
def eager(monkeypatch):
    "torch.compile without a compiler behind it: as quick as it gets; what was compiled, a line a graph."
    import torch._dynamo as dynamo

    dynamo.reset()
    real, graphs = torch.compile, []

    def seen(graph, inputs):
        graphs.append([tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(torch, 'compile', lambda f, **how: real(f, backend=seen, **how))
    yield graphs
    dynamo.reset()


def test_compiled_for_each_shape_and_the_same(models, generator, eager):
    g = Generator.from_pretrained(models['kl'], backend='torch-compile')
    assert g.backend.name == 'torch-compile' and not eager
    first = g('a red rose', num_inference_steps=4)
    once = len(eager)
    assert once == 2 and same(
        first, generator('a red rose', num_inference_steps=4)
    )  # the UNet whole, and the decoder
    g('a white daisy', num_inference_steps=6, seed=4)
    assert len(eager) == once
    assert (
        same(
            g('a red rose', num_images_per_prompt=2, size=48, num_inference_steps=3),
            generator('a red rose', num_images_per_prompt=2, size=48, num_inference_steps=3),
        )
        and len(eager) == 2 * once
    )
    _, asked, there = products_asked(g.backend.unet, lambda: g('an iris', num_inference_steps=5))
    assert asked in (0, there)  # none in the steps
    seen = {}
    threads = [
        threading.Thread(target=lambda i=i: seen.update({i: g('a red rose', seed=i, num_inference_steps=4)}))
        for i in range(3)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(same(seen[i], generator('a red rose', seed=i, num_inference_steps=4)) for i in range(3))


@pytest.mark.skipif(bool(why_not_compile()), reason='no C++ compiler')
def test_the_real_compiler_draws_the_same(models, generator):
    fast, b, z = load_backend(models['kl'], 'torch-compile'), generator.backend, torch.randn(2, 4, 16, 16)
    text = b.condition(b.encode(['a red rose', '']))
    for t in (999, 20):
        assert (
            fast.denoise(z, torch.tensor(t), text) - b.denoise(z, torch.tensor(t), text)
        ).abs().max() < 1e-4


def test_no_compiler_or_a_broken_one_is_said(models, monkeypatch):
    monkeypatch.setenv('CXX', '/nowhere/c++')
    with pytest.raises(UserError, match='backend torch-compile: there is no C.. compiler ./nowhere/c..'):
        load_backend(models['kl'], 'torch-compile')
    monkeypatch.delenv('CXX')
    real = torch.compile

    def broken(graph, inputs):
        raise OSError('cannot execute\ncc1plus')

    monkeypatch.setattr(torch, 'compile', lambda f, **how: real(f, backend=broken, **how))
    with pytest.raises(UserError, match='the compiler failed .*cannot execute.*use the backend torch') as e:
        Generator.from_pretrained(models['kl'], backend='torch-compile')('a rose', num_inference_steps=1)
    assert '\n' not in str(e.value)


ROOM = """import sys; sys.path[:0] = sys.argv[4:]
from train_worker import inject_fault
from flowerdiff.inference.backends import open_backend
from flowerdiff.inference.generator import Generator
from flowerdiff.core.workspace import UserError
import torch; torch.backends.mkldnn.enabled = False  # which fails in its own way once it failed
g = Generator(open_backend(sys.argv[1], sys.argv[2]), batch=64)
small = g('a rose', num_images_per_prompt=2, num_inference_steps=1)
inject_fault('memory', int(sys.argv[3]))
try: g('a rose', n=64, steps=1, size=256); print('it fitted')
except UserError as e: print(e)
assert [p.tobytes() for p in g('a rose', num_images_per_prompt=2, num_inference_steps=1)] == [p.tobytes() for p in small]"""


@pytest.mark.skipif(sys.platform != 'linux', reason='limits the address space')
def test_a_batch_beyond_memory_is_said_and_the_next_is_drawn(models):
    done = subprocess.run(
        [sys.executable, '-c', ROOM, 'torch', str(models['kl']), '400', str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
    )
    assert (
        (done.stdout.splitlines() or [''])[-1]
        == '64 pictures of 256 x 256 pixels at once do not fit into memory; draw fewer at once (batch or num_images_per_prompt below 64) or a smaller size'
        and not done.returncode
    ), done.stdout + done.stderr


@pytest.mark.parametrize(
    'raised',
    [
        MemoryError(),
        torch.OutOfMemoryError('CUDA out of memory. Tried'),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError('could not create a primitive'),
        Exception('[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bad allocation'),
        Exception('Failed to allocate memory for requested buffer of size 9'),
        RuntimeError('std::bad_alloc'),
    ],
    ids=lambda e: str(e)[:20] or type(e).__name__,
)
@pytest.mark.parametrize('where', ['encode', 'denoise', 'decode'])
def test_every_way_to_say_that_memory_is_out(generator, raised, where):
    class Full:
        def __getattr__(self, name):
            return getattr(generator.backend, name) if name != where else self.fail

        def fail(self, *_):
            raise raised

    with pytest.raises(
        UserError, match='^3 pictures of 32 x 32 pixels at once do not fit into memory; draw fewer'
    ) as e:
        Generator(Full())('a rose', num_images_per_prompt=3, num_inference_steps=1)
    assert '\n' not in str(e.value)
    with pytest.raises(
        UserError, match='^1 picture of 32 x 32 pixels at once does not fit into memory; draw a smaller size$'
    ):
        Generator(Full())('a rose', num_inference_steps=1)


def test_another_error_is_not_memory(generator):
    class Wrong:
        def __getattr__(self, name):
            return getattr(generator.backend, name) if name != 'decode' else lambda *_: 1 / 0

    with pytest.raises(ZeroDivisionError):
        Generator(Wrong())('a rose', num_inference_steps=1)


def test_steps_are_told_previews_shown_and_false_stops(generator):
    seen = []
    generator(
        'a rose',
        num_images_per_prompt=3,
        num_inference_steps=4,
        callback=lambda s: seen.append((s.step, s.steps, [p.size for p in s.preview(48)])),
    )
    assert [s[:2] for s in seen] == [(i, 4) for i in (1, 2, 3, 4)] and seen[0][2] == [(48, 48)] * 3
    count = []
    with pytest.raises(Cancelled):
        generator('a rose', num_inference_steps=9, callback=lambda s: count.append(s) or s.step < 2)
    assert len(count) == 2
    batches = []
    Generator(generator.backend, batch=2)(
        'a rose',
        num_images_per_prompt=3,
        num_inference_steps=2,
        callback=lambda s: batches.append((s.step, s.steps, len(s.latents))),
    )
    assert batches == [(1, 4, 2), (2, 4, 2), (3, 4, 1), (4, 4, 1)]


def test_the_last_preview_is_the_picture_made_small(generator):
    last = []
    picture = generator('a red rose', num_inference_steps=12, callback=lambda s: last.append(s.latents))[0]
    exact = pixels(sampling.to_pil(generator.backend.decode(last[-1])))
    assert np.abs(exact - pixels([picture])).max() <= 4


def test_what_is_cut_from_a_prompt_is_said(generator):
    with pytest.warns(UserWarning, match='longer than 16 tokens; not read: .*meadow'):
        long = generator(
            'a red rose under the sky in the white yellow blue iris daisy sky sky meadow',
            num_inference_steps=1,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'prompt')
        generator('a red rose', num_inference_steps=1)
    assert long[0].size == (32, 32)


def test_other_sizes(generator):
    assert generator('a rose', num_inference_steps=1, size=(48, 16))[0].size == (48, 16)


@pytest.mark.parametrize(
    'wish, line',
    [
        (dict(num_inference_steps=0), 'num_inference_steps: 0 is not'),
        (dict(num_inference_steps=10**9), 'num_inference_steps: '),
        (dict(num_inference_steps='many'), 'num_inference_steps: many'),
        (dict(num_inference_steps=10**400), 'num_inference_steps: 1'),
        (dict(size=(1, 2, 3)), 'size: (1, 2, 3) is not'),
        (dict(size='big'), 'width: big'),
        (dict(negative_prompt=None), 'negative_prompt: must be text'),
        (dict(negative_prompt='\x00PNG'), 'negative_prompt: holds bytes'),
        (dict(negative_prompt='no ' * 10**5), 'negative_prompt: has 300,000'),
        (dict(num_images_per_prompt=0), 'num_images_per_prompt: 0'),
        (dict(num_images_per_prompt=10**7), 'num_images_per_prompt: '),
        (dict(seed=-1), 'seed: -1'),
        (dict(seed=1.5), 'seed: 1.5'),
        (dict(guidance_scale=-1), 'guidance_scale: -1'),
        (dict(guidance_scale=float('nan')), 'guidance_scale: nan'),
        (dict(size=33), 'width: 33 is not a multiple of 4'),
        (dict(size=10**6), 'width: '),
        (dict(size=(32, 0)), 'height: 0'),
        (dict(scheduler='magic'), 'scheduler: '),
        (dict(scheduler='lcm', num_inference_steps=60), 'scheduler: lcm does not do 60 steps'),
        (dict(guidance_interval=(0, 2)), 'guidance_interval: 2'),
        (dict(guidance_interval='all'), 'guidance_interval: all is not two shares'),
        (dict(prompt=[]), 'prompt: the list is empty'),
        (dict(prompt=' '), 'prompt: is empty'),
        (dict(prompt=None), 'prompt: '),
        (dict(prompt='rose ' * 10**5), 'prompt: has 500,000 characters'),
        (dict(prompt='\x89PNG\x00\x1a'), 'prompt: holds bytes'),
        (dict(prompt=b'rose'), 'prompt: '),
    ],
)
def test_bad_wishes_get_one_line(generator, wish, line):
    with pytest.raises(UserError) as e:
        generator(**dict(prompt='a rose') | wish)
    assert str(e.value).startswith(line) and '\n' not in str(e.value)


def test_a_batch_of_none_gets_one_line(generator):
    for batch in (0, -1, 'many'):
        with pytest.raises(UserError, match=f'^batch: {batch} is not'):
            Generator(generator.backend, batch=batch)('a rose')


def damage(folder, how):
    weights = folder / 'unet' / 'diffusion_pytorch_model.safetensors'
    if how == 'truncated':
        weights.write_bytes(weights.read_bytes()[:-1000])
    if how == 'not safetensors':
        weights.write_bytes(b'PK\x03\x04 a pickle')
    if how == 'no weights':
        weights.unlink()
    if how == 'no tokenizer':
        shutil.rmtree(folder / 'tokenizer')
    if how == 'no autoencoder':
        shutil.rmtree(folder / 'vae')
    if how == 'bad json':
        (folder / 'unet' / 'config.json').write_text('{')
    if how == 'no such scheduler':
        (folder / 'scheduler' / 'scheduler_config.json').write_text('{"_class_name": "Magic"}')
    if how == 'a schedule nobody knows':
        (folder / 'scheduler' / 'scheduler_config.json').write_text(
            '{"_class_name": "DDIMScheduler", "beta_schedule": "wavy"}'
        )
    if how == 'other pipeline':
        (folder / 'model_index.json').write_text('{"_class_name": "FluxPipeline"}')
    if how == 'half the weights':
        from safetensors.torch import load_file, save_file

        kept = dict(list(load_file(weights).items())[::2])
        save_file(kept, weights, metadata=dict(format='pt'))
    if how == 'half a text encoder':
        from safetensors.torch import load_file, save_file

        path = folder / 'text_encoder' / 'model.safetensors'
        kept = dict(list(load_file(path).items())[::2])
        save_file(kept, path, metadata=dict(format='pt'))
    return folder


@pytest.mark.parametrize(
    'how',
    [
        'truncated',
        'not safetensors',
        'no weights',
        'no tokenizer',
        'no autoencoder',
        'bad json',
        'no such scheduler',
        'a schedule nobody knows',
        'other pipeline',
        'half the weights',
        'half a text encoder',
    ],
)
def test_a_broken_model_gets_one_line_that_names_the_part(models, tmp_path, how):
    folder = damage(Path(shutil.copytree(models['kl'], tmp_path / 'm')), how)
    with pytest.raises(UserError) as e:
        Generator.from_pretrained(folder)
    assert '\n' not in str(e.value) and str(folder) in str(e.value)


def test_what_may_be_opened(models, tmp_path, monkeypatch):
    shutil.copytree(models['kl'], tmp_path / 'ws' / 'model')
    assert Generator.from_pretrained(tmp_path / 'ws').backend.folder == tmp_path / 'ws' / 'model'
    for where, line in (
        (tmp_path, 'not a model folder'),
        (tmp_path / 'no' / 'such', 'not there'),
        ('/', 'not a model folder'),
    ):
        with pytest.raises(UserError, match=line):
            Generator.from_pretrained(where)
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new' / 'params.yaml').write_text('')
    with pytest.raises(UserError, match='no model yet'):
        Generator.from_pretrained(tmp_path / 'new')
    with pytest.raises(UserError, match='abacus'):
        Generator.from_pretrained(models['kl'], backend='abacus')
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub,
        'snapshot_download',
        lambda repo, revision, allow_patterns, local_files_only: (
            asked.update(repo=repo, revision=revision, allow=allow_patterns) or models['kl']
        ),
    )
    assert load_backend('someone/flowers@0123abc').folder == models['kl']
    assert (
        asked['repo'] == 'someone/flowers'
        and asked['revision'] == '0123abc'
        and not any(p.endswith(('.bin', '.pkl', '.pt', '.py')) for p in asked['allow'])
    )
    monkeypatch.setattr(
        huggingface_hub,
        'snapshot_download',
        lambda *a, **k: (_ for _ in ()).throw(OSError('no network\nat all')),
    )
    with pytest.raises(UserError, match='cannot be downloaded') as e:
        load_backend('someone/flowers')
    assert '\n' not in str(e.value)


def test_opening_costs_nothing_before_it_is_asked_for():
    "The report and the sampler are imported by light processes."
    code = "import sys, flowerdiff.evaluation.report; assert 'torch' not in sys.modules and 'jinja2' not in sys.modules; import flowerdiff.inference.generator, flowerdiff.inference.backends; assert not {'diffusers', 'transformers', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)
