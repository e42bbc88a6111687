"""The profiles of real data, run whole through all ten stages.

The data are miniatures in the official layouts. Only settings of sizes are changed.
"""

import importlib
import io
import json
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from scipy.io import savemat
from test_datasets import truth
from tiny import tiny_clip, tiny_florence, tiny_stable_diffusion, tiny_vae

from flowerdiff import Generator
from flowerdiff.core.files import read_json
from flowerdiff.core.profiles import load_profile
from flowerdiff.core.workspace import STAGES, open_workspace, read_jsonl
from flowerdiff.data.caption_cleanup import clean_caption, mention
from flowerdiff.data.datasets import CELEBA, FLOWERS
from flowerdiff.data.shards import Shards
from flowerdiff.garden.flower_shapes import COLORS, PETALS
from flowerdiff.garden.garden import BACKGROUNDS, draw

QUICK = {'train.threads': 1, 'tracking.enabled': False}
SMALL = {
    'train.channels': [16, 16, 32],
    'train.attention_head_dim': 8,
    'evaluate.prompts': 6,
    'evaluate.kid_pictures': 8,
    'evaluate.grid': 2,
} | QUICK


def through(root, profile, overrides, stages=STAGES):
    "The stages one after the other, in this process; from ONNX on, four steps a picture."
    ws = open_workspace(root, profile, overrides)
    return ws, {
        s: importlib.import_module(f'flowerdiff.stages.{s}').run(
            root, overrides={'evaluate.steps': 4} if s == 'onnx' else None
        )
        for s in stages
    }


# ---- what is true of every run


def rows(ws):
    return {
        f'{s}/{r["file_name"]}': dict(r, split=s, name=Path(r['source']).name)
        for s in ('train', 'val', 'test')
        for r in read_jsonl(ws.pictures / s / 'metadata.jsonl')
    }


def said(ws):
    return {r['file_name']: r['captions'] for r in read_jsonl(ws.captions / 'metadata.jsonl')}


def pixels(file):
    return (
        torch.from_numpy(np.array(Image.open(file).convert('RGB'))).permute(2, 0, 1)[None].float() / 127.5 - 1
    )


def started(ws):
    files = ws.work.glob('train-*/events.jsonl')
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def check_latents(ws, vae):  # of picture k, and of its mirror, as Diffusers' own class makes them
    for split in ('train', 'val', 'test'):
        files = read_json(ws.encoded / split / 'files.json', kind=list)
        assert files == [r['file_name'] for r in read_jsonl(ws.pictures / split / 'metadata.jsonl')]
        z = Shards(ws.encoded / split, 'latents').gather(range(len(files)))
        with torch.no_grad():
            for mirrored, turn in enumerate((lambda x: x, lambda x: x.flip(-1))):
                seen = [vae.encode(turn(pixels(ws.pictures / split / f))).latent_dist for f in files]
                for name in ('mean', 'std'):
                    true, kept = (
                        torch.cat([getattr(d, name) for d in seen]) * vae.config.scaling_factor,
                        torch.from_numpy(z[name][:, mirrored]).float(),
                    )
                    assert (kept - true).abs().max() < 0.03 * true.abs().max(), (split, name)
                    if name == 'mean':
                        assert (
                            torch.cdist(kept.flatten(1), true.flatten(1)).argmin(1)
                            == torch.arange(len(files))
                        ).all(), 'each is nearest to its own'


def check_texts(
    ws, folder
):  # the embedding that picture k is trained with is its caption's, as transformers' own class makes it
    from transformers import CLIPTextModel, CLIPTokenizer

    tok, model = CLIPTokenizer.from_pretrained(folder), CLIPTextModel.from_pretrained(folder)
    e, texts, captions = (
        Shards(ws.encoded / 'text', 'text').load()['embedding'],
        read_json(ws.encoded / 'text' / 'texts.json', kind=list),
        said(ws),
    )
    for split in ('train', 'val', 'test'):
        for f, numbers in zip(
            read_json(ws.encoded / split / 'files.json', kind=list),
            read_json(ws.encoded / split / 'captions.json', kind=list),
        ):
            assert [texts[i] for i in numbers] == captions[f'{split}/{f}']
    ids = tok(texts, padding='max_length', max_length=77, truncation=True, return_tensors='pt').input_ids
    with torch.no_grad():
        true = model(ids)[0]
    assert (
        texts[0] == ''
        and np.abs(e.astype(np.float32) - true.numpy()).max() < 0.01
        and len({x.tobytes() for x in e}) == len(texts)
    )


def check_schedule(ws, **want):
    config = read_json(ws.model / 'scheduler' / 'scheduler_config.json')
    assert {k: config[k] for k in want} == want


def check_training(
    ws, kind
):  # the settings of the profile are those that the run had, and what it did shows it
    e, t = started(ws), load_profile(kind).train
    start = next(x for x in e if x['event'] == 'start')
    run = start['params']
    for k in (
        'optimizer',
        'lr',
        'weight_decay',
        'beta2',
        'warmup_steps',
        'lr_schedule',
        'grad_clip',
        'batch_size',
        'accumulate',
        'epochs',
        'min_snr_gamma',
        'caption_dropout',
        'mirror',
        'ema_decay',
        'gradient_checkpointing',
        'stream',
    ):
        assert run[f'train.{k}'] == getattr(t, k), k
    n = len(read_json(ws.encoded / 'train' / 'files.json', kind=list))
    done = read_json(ws.root / 'train.json')
    assert (
        done['steps'] == start['total'] == -int(-n * t.epochs // t.batch_size)
        and done['samples'] == done['steps'] * t.batch_size
    )
    kept = load_file(sorted(ws.work.glob('train-*/checkpoints/*/optimizer.safetensors'))[-1])
    assert {k.partition('.')[2] for k in kept} == {'step', 'exp_avg', 'exp_avg_sq'}  # AdamW's
    steps = [x for x in e if x['event'] == 'step']
    assert steps
    for x in steps:  # the curve of the learning rate
        i = x['step'] - 1
        falls = dict(cosine=0.5 + 0.5 * np.cos(np.pi * i / done['steps']), constant=1.0)[t.lr_schedule]
        assert x['lr'] == pytest.approx(t.lr * min(1, (i + 1) / t.warmup_steps) * falls)
    return start


def check_report(ws, kind, steps=None):  # None: as many as the profile's
    e, m = load_profile(kind).evaluate, read_json(ws.report / 'metrics.json')
    steps = steps or e.steps
    by, page = dict(flowers102='ddim', celeba='ddpm').get(kind), (ws.report / 'index.html').read_text()
    assert (
        m['protocol']['num_inference_steps'],
        m['protocol']['guidance_scale'],
        m['protocol'].get('scheduler'),
    ) == (
        steps,
        e.guidance,
        by,
    ) and f'{steps} steps{f" of {by}" if by else ""}, guidance {e.guidance:g}' in page
    assert all(p in page for p in e.grid_prompts[:2]) and len(e.grid_prompts) == (
        5 if kind == 'flowers102' else 0
    )
    return m


def check_builds(ws, results):
    parity = read_json(ws.onnx / 'parity.json')
    assert parity['passed'] and {'text_encoder', 'unet', 'vae_decoder', 'vae_encoder'} == set(parity['parts'])
    status = read_json(ws.tensorrt / 'status.json')
    assert status['built'] == (not results['tensorrt'].skipped) and (
        status['built'] or 'no NVIDIA GPU' in status['reason']
    )


def check_published(ws, steps=4):  # stock Diffusers opens it, and it draws what the Generator draws
    from diffusers import StableDiffusionPipeline

    folder = Path(read_json(ws.root / 'published.json')['url'])
    caption = next(iter(said(ws).values()))[0]
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        caption, num_inference_steps=steps, guidance_scale=5.0, generator=torch.Generator().manual_seed(3)
    ).images[0]
    ours = Generator.from_pretrained(ws.root, backend='torch')(
        caption, seed=3, num_inference_steps=steps, guidance_scale=5.0
    )[0]
    assert (
        ours.size == theirs.size == (ws.settings.prepare.resolution,) * 2
        and np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    )
    assert f'license: {ws.settings.publish.license}' in (folder / 'README.md').read_text()
    return folder, pipe


# ---- Oxford's flowers, described by Florence-2

KINDS = dict(
    sunflower='sunflower',
    rose='rose',
    daisy='oxeye daisy',
    iris='bearded iris',
    lily='tiger lily',
    poppy='corn poppy',
)  # drawn, and the class that it stands for


def oxford(folder: Path, n=36) -> Path:
    "Drawn flowers in the archive and the tables of Oxford: 24 to train, six each to validate and test."
    folder.mkdir(parents=True)
    species = list(KINDS)
    with tarfile.open(folder / '102flowers.tgz', 'w:gz') as t:
        for i in range(1, n + 1):
            flower = draw(
                dict(
                    species=species[i % 6],
                    color=list(COLORS)[i % 8],
                    background=BACKGROUNDS[i // 2 % 5],
                    petals=PETALS[species[i % 6]][0],
                    size='large',
                    count=1,
                ),
                9,
                i,
                80,
            )
            wide = Image.new('RGB', [(104, 80), (80, 96)][i % 2], 'black')
            wide.paste(flower, ((wide.width - 80) // 2, (wide.height - 80) // 2))
            b = io.BytesIO()
            wide.save(b, 'JPEG', quality=92)
            m = tarfile.TarInfo(f'jpg/image_{i:05}.jpg')
            m.size = b.tell()
            b.seek(0)
            t.addfile(m, b)
    ids = np.random.default_rng(0).permutation(n) + 1
    parts = dict(trnid=ids[: n - 12], valid=ids[n - 12 : n - 6], tstid=ids[n - 6 :])
    savemat(
        folder / 'imagelabels.mat',
        dict(
            labels=np.array([FLOWERS.index(KINDS[species[i % 6]]) + 1 for i in range(1, n + 1)], np.uint8)[
                None
            ]
        ),
    )
    savemat(folder / 'setid.mat', {k: np.sort(v).astype(np.uint16)[None] for k, v in parts.items()})
    return folder


@pytest.fixture(scope='module')
def flowers(tmp_path_factory):
    d = tmp_path_factory.mktemp('flowers')
    tiny_vae(d / 'vae')
    parts = {
        'prepare.files': oxford(d / 'files'),
        'caption.model': tiny_florence(d / 'florence'),
        'components.text_encoder': tiny_clip(d / 'clip'),
        'components.autoencoder': d / 'vae',
    }
    return *through(
        d / 'ws',
        'flowers102',
        SMALL
        | {k: str(v) for k, v in parts.items()}
        | {'prepare.resolution': 64, 'prepare.split': 'official', 'caption.max_new_tokens': 16},
    ), d


def test_flowers_are_split_and_named_as_oxford_says(flowers):
    from scipy.io import loadmat

    ws, _, d = flowers
    ids = {
        int(i): s
        for s, k in dict(train='trnid', val='valid', test='tstid').items()
        for i in loadmat(d / 'files' / 'setid.mat')[k].ravel()
    }
    labels = loadmat(d / 'files' / 'imagelabels.mat')['labels'].ravel()
    seen = {int(r['name'][6:11]): r for r in rows(ws).values()}
    assert {i: r['split'] for i, r in seen.items()} == ids and {i: r['label'] for i, r in seen.items()} == {
        i + 1: FLOWERS[label - 1] for i, label in enumerate(labels)
    }
    with tarfile.open(d / 'files' / '102flowers.tgz') as t:
        for f, r in rows(ws).items():  # the middle of the photograph, not squashed
            whole = Image.open(t.extractfile(f'jpg/{r["name"]}'))
            side = min(whole.size)
            x, y = ((v - side) // 2 for v in whole.size)
            true = whole.crop((x, y, x + side, y + side)).resize((64, 64), Image.Resampling.LANCZOS)
            assert np.abs(np.asarray(true, int) - np.asarray(Image.open(ws.pictures / f), int)).mean() < 4


def test_flowers_are_described_by_florence_under_their_names(flowers):
    from flowerdiff.models.florence import open_florence

    ws, _, d = flowers
    c = ws.settings.caption
    seen, captions = rows(ws), said(ws)
    answers = open_florence(d / 'florence', num_beams=c.num_beams, max_new_tokens=c.max_new_tokens).describe(
        [Image.open(ws.pictures / f) for f in seen], '<DETAILED_CAPTION>'
    )
    assert (
        captions == {f: [clean_caption(a, r['label'])] for (f, r), a in zip(seen.items(), answers)}
        and len(set(answers)) > 12
    )
    assert (
        all(mention(r['label']).search(captions[f][0]) for f, r in seen.items())
        and sum(bool(mention(r['label']).search(a)) for r, a in zip(seen.values(), answers)) < 8
    )
    assert {r['captioner'] for r in read_jsonl(ws.captions / 'metadata.jsonl')} == {'florence'}


def test_flowers_are_encoded_trained_and_drawn(flowers):
    from diffusers import AutoencoderKL

    from flowerdiff.evaluation.measure import LABELS

    ws, results, d = flowers
    vae = AutoencoderKL.from_pretrained(d / 'vae')
    assert read_json(ws.encoded / 'manifest.json')['scaling_factor'] == vae.config.scaling_factor == 0.18215
    check_latents(ws, vae)
    check_texts(ws, d / 'clip')
    check_training(ws, 'flowers102')
    check_schedule(
        ws,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule='scaled_linear',
        num_train_timesteps=1000,
        prediction_type='epsilon',
    )
    unet = read_json(ws.model / 'unet' / 'config.json')
    assert (
        unet['down_block_types'] == ['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D']
        and unet['cross_attention_dim'] == 32
        and unet['sample_size'] == 8
    )
    m = check_report(ws, 'flowers102')
    for name in ('clip_score', 'cmmd', 'copies', 'kid', 'fid'):  # a value, or why it cannot be measured
        assert (name in m) != (LABELS[name] in m['skipped']), (name, m['skipped'])
    assert 'adherence' in m['skipped']
    check_builds(ws, results)
    folder, pipe = check_published(ws)
    assert not (folder / 'lora').exists() and torch.equal(
        pipe.vae.encoder.conv_in.weight, vae.encoder.conv_in.weight
    )


# ---- CelebA's faces, described by their attributes

SKIN, HAIR = (
    (222, 180, 148),
    dict(
        Black_Hair=(24, 22, 26),
        Brown_Hair=(110, 66, 34),
        Blond_Hair=(236, 208, 120),
        Gray_Hair=(168, 168, 172),
    ),
)


def face(row, i):  # 178 x 218, as CelebA aligns them
    rng = np.random.default_rng(i)

    def color():
        return tuple(map(int, rng.integers(30, 250, 3)))

    im = Image.new('RGB', (178, 218), color())
    d = ImageDraw.Draw(im)
    for _ in range(3):
        x, y = map(int, rng.integers(-60, 120, 2))
        d.rectangle((x, y, x + 120, y + 120), fill=color())
    hair = next(HAIR[k] for k in HAIR if row[k] == 1)
    d.ellipse((34, 46, 144, 166 if row['Male'] == 1 else 206), fill=hair)
    d.ellipse((46, 74, 132, 182), fill=SKIN)
    for x in (70, 108):
        d.ellipse((x - 6, 112, x + 6, 120), fill='black')
        d.ellipse((x - 16, 102, x + 16, 130), outline='black', width=4 * (row['Eyeglasses'] == 1))
    d.arc(
        (66, 130, 112, 164) if row['Smiling'] == 1 else (66, 152, 112, 186),
        *((20, 160) if row['Smiling'] == 1 else (200, 340)),
        fill=(150, 30, 40),
        width=5,
    )
    return im


def celeba(folder: Path, n=36) -> Path:
    "Drawn faces and the tables of CelebA: 24 to train, six each to validate and test, in no order."
    folder.mkdir(parents=True)
    table = {}
    for i in range(1, n + 1):
        rng = np.random.default_rng([7, i])
        yes = {list(HAIR)[int(rng.integers(4))]} | {
            k for k in ('Smiling', 'Eyeglasses', 'Male', 'Young', 'No_Beard') if rng.random() < 0.5
        }
        table[f'{i:06}.jpg'] = {k: 1 if k in yes else -1 for k in CELEBA}
    with zipfile.ZipFile(folder / 'img_align_celeba.zip', 'w') as z:
        for i, (name, row) in enumerate(table.items()):
            b = io.BytesIO()
            face(row, i).save(b, 'JPEG', quality=92)
            z.writestr(f'img_align_celeba/{name}', b.getvalue())
    (folder / 'list_attr_celeba.txt').write_text(
        '\n'.join(
            [
                str(n),
                ' '.join(CELEBA),
                *(f'{k} ' + ' '.join(f'{v:2}' for v in row.values()) for k, row in table.items()),
            ]
        )
        + '\n'
    )
    (folder / 'list_eval_partition.txt').write_text(
        ''.join(f'{k} {[0, 0, 1, 0, 2, 0][i % 6]}\n' for i, k in enumerate(table))
    )
    return folder


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    d = tmp_path_factory.mktemp('people')
    parts = {
        'prepare.files': celeba(d / 'files'),
        'components.text_encoder': tiny_clip(d / 'clip', halves=1),
        'encode.vae_minutes': 0.05,
    }
    return *through(
        d / 'ws',
        'celeba',
        SMALL | {k: v if isinstance(v, float) else str(v) for k, v in parts.items()} | {'evaluate.steps': 4},
    ), d


def test_faces_are_split_and_described_as_their_tables_say(people):
    ws, _, d = people
    lines = (d / 'files' / 'list_eval_partition.txt').read_text().splitlines()
    official = dict(line.split() for line in lines)
    seen, captions = rows(ws), said(ws)
    assert {r['name']: r['split'] for r in seen.values()} == {
        k: ('train', 'val', 'test')[int(v)] for k, v in official.items()
    } and len(seen) == 36
    colors = np.array(list(HAIR.values()))
    for f, r in seen.items():
        for c in captions[f]:
            truth(c, r['attributes'])
        x = np.asarray(Image.open(ws.pictures / f), int)
        assert x.shape == (64, 64, 3)
        nearest = list(HAIR)[
            np.abs(colors - np.median(x[12:18, 28:36].reshape(-1, 3), 0)).sum(1).argmin()
        ]  # what can be seen above the forehead
        assert r['attributes'][nearest] == 1, f
        hair = {w for c in captions[f] for w in re.findall(r'(black|brown|blond|gray) hair', c)}
        assert hair <= {nearest[:-5].lower()}
    assert sum(bool(re.search(r'black|brown|blond|gray', ' '.join(c))) for c in captions.values()) > 24


def test_faces_have_latents_of_their_own(people):
    from diffusers import AutoencoderKL

    ws, _results, d = people
    trained = next(ws.work.glob('vae-*')) / 'vae'
    vae, m = AutoencoderKL.from_pretrained(trained), read_json(ws.encoded / 'manifest.json')
    z = Shards(ws.encoded / 'train', 'latents').load()
    mean, std = (z[k].astype(np.float32) for k in ('mean', 'std'))
    assert (
        m['shapes']['mean'] == [2, 4, 32, 32]
        and m['scaling_factor'] == vae.config.scaling_factor != 0.18215
        and mean.var() + (std**2).mean() == pytest.approx(1, abs=0.1)
    )
    check_latents(ws, vae)
    check_texts(ws, d / 'clip')
    _folder, pipe = check_published(ws)
    assert (
        all(torch.equal(a, b) for a, b in zip(pipe.vae.state_dict().values(), vae.state_dict().values()))
        and pipe.vae.config.scaling_factor == m['scaling_factor']
    )
    assert read_json(ws.report / 'metrics.json')['psnr'] > 8


def test_faces_are_trained_in_little_memory_and_drawn_by_ddpm(people):
    from diffusers import DDPMScheduler

    ws, results, _d = people
    check_training(ws, 'celeba')
    check_schedule(
        ws,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule='linear',
        num_train_timesteps=1000,
        prediction_type='epsilon',
    )
    assert read_json(ws.model / 'unet' / 'config.json')['down_block_types'] == [
        'DownBlock2D',
        'CrossAttnDownBlock2D',
        'CrossAttnDownBlock2D',
    ]
    ddpm = DDPMScheduler.from_pretrained(ws.model / 'scheduler')
    assert torch.allclose(ddpm.alphas_cumprod, (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0), atol=1e-6)
    draw = Generator.from_pretrained(ws.root, backend='torch')
    a, b = (
        draw('a smiling woman with black hair', seed=1, num_inference_steps=5, scheduler=k)[0]
        for k in ('ddpm', 'dpm')
    )
    assert a.tobytes() != b.tobytes()
    assert 'image encoder' in ' '.join(check_report(ws, 'celeba', 4)['skipped'].values())
    check_builds(ws, results)


# ---- Stable Diffusion, gone on with


@pytest.fixture(scope='module')
def mine(tmp_path_factory):  # captioned pictures, a base, and what it became: whole, and by LoRA
    d = tmp_path_factory.mktemp('mine')
    clip = tiny_clip(d / 'clip')
    base = str(tiny_stable_diffusion(d / 'base', clip))
    (d / 'pictures').mkdir()
    with open(d / 'pictures' / 'metadata.jsonl', 'w', encoding='utf-8') as f:
        for i in range(40):
            a = dict(
                species=list(KINDS)[i % 6],
                color=list(COLORS)[i % 8],
                background=BACKGROUNDS[i // 2 % 5],
                petals=PETALS[list(KINDS)[i % 6]][0],
                size='large',
                count=1,
            )
            draw(a, 3, i, 64).save(d / 'pictures' / f'{i:03}.png')
            print(
                json.dumps(
                    dict(file_name=f'{i:03}.png', captions=[f'number {i}, a {a["color"]} {a["species"]}'])
                ),
                file=f,
            )
    parts = {
        'prepare.source': str(d / 'pictures'),
        'train.init': base,
        'evaluate.baseline': base,
        'components.autoencoder': base,
        'components.text_encoder': str(clip),
    }
    sizes = {k: v for k, v in SMALL.items() if k not in ('train.channels', 'train.attention_head_dim')} | {
        'prepare.resolution': 64,
        'prepare.val': 0.2,
        'prepare.test': 0.2,
        'evaluate.steps': 4,
    }
    whole = through(d / 'whole', 'sd_finetune', parts | sizes)
    shutil.copytree(
        d / 'whole',
        d / 'lora',
        ignore=shutil.ignore_patterns(
            'model', 'candidate', 'published*', 'report', 'onnx', 'tensorrt', 'train-*', 'promote*'
        ),
    )
    lora = through(d / 'lora', None, {'train.lora_rank': 4, 'train.lr': 0.01}, STAGES[4:])
    return dict(whole=whole, lora=lora), d


def weights(folder):
    return load_file(folder / 'unet' / 'diffusion_pytorch_model.safetensors')


def test_finetuning_begins_as_the_base_and_keeps_its_question(mine):
    from diffusers import AutoencoderKL

    (ws, results), d = mine[0]['whole'], mine[1]
    captions = said(ws)
    assert (
        all(
            captions[f] == [f'number {int(r["name"][:3])}, ' + captions[f][0].split(', ')[1]]
            for f, r in rows(ws).items()
        )
        and len(captions) == 40
    )
    check_latents(ws, AutoencoderKL.from_pretrained(d / 'base', subfolder='vae'))
    check_texts(ws, d / 'clip')
    start = check_training(ws, 'sd_finetune')
    check_schedule(
        ws,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule='scaled_linear',
        num_train_timesteps=1000,
        prediction_type='epsilon',
    )  # the base's, not the settings' v_prediction
    far = {k: float((v - weights(d / 'base')[k]).abs().max()) for k, v in weights(ws.model).items()}
    assert start['trained'] == start['parameters'] and all(0 < x < 1e-3 for x in far.values()), (
        far
    )  # at 5e-6 a step
    assert any(e['event'] == 'note' and 'train.max_hours: 24 h allow all' in e['text'] for e in started(ws))
    check_builds(ws, results)
    assert not (check_published(ws)[0] / 'lora').exists()


@pytest.mark.parametrize('how', ['whole', 'lora'])
def test_finetuned_is_measured_beside_its_base(mine, how):
    from flowerdiff.drawing.model_files import weights_fingerprint

    (ws, _), d = mine[0][how], mine[1]
    m = check_report(ws, 'sd_finetune', 4)
    b = m['baseline']
    assert (
        b['model'] == weights_fingerprint(d / 'base') != m['model']
        and b['pictures'] == 100 // b['prompts'] * b['prompts'] > 90
        and b['passed'] == (b['fid']['drawn']['value'] <= 1.1 * b['fid']['baseline']['value'])
    )
    if how == 'whole':
        assert b['passed'] and b['fid']['drawn']['value'] == pytest.approx(
            b['fid']['baseline']['value'], rel=0.05
        )  # still nearly the same
    page = (ws.report / 'index.html').read_text()
    assert 'Comparison with a baseline' in page and f'the baseline ({b["model"][:16]})' in page


def test_lora_is_published_as_diffusers_loads_it(mine):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    (ws, results), d = mine[0]['lora'], mine[1]
    t = read_json(ws.root / 'train.json')
    assert 0 < t['trained'] < 0.2 * t['parameters']
    folder, pipe = check_published(ws)
    check_builds(ws, results)
    assert 'load_lora_weights' in (folder / 'README.md').read_text()

    def draw(pipeline):
        generator = torch.Generator().manual_seed(0)
        images = pipeline('number 3, a red rose', num_inference_steps=4, generator=generator).images
        return np.array(images[0], int)

    base = StableDiffusionPipeline.from_pretrained(d / 'base')
    base.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    base.set_progress_bar_config(disable=True)
    plain = draw(base)
    base.load_lora_weights(folder, subfolder='lora')
    assert np.abs(draw(base) - draw(pipe)).max() <= 2 < 10 < np.abs(draw(pipe) - plain).max()


# ---- the networks at their full size, without their weights


@pytest.mark.parametrize(
    'profile, width, side, weights', [('flowers102', 768, 16, 148_345_732), ('celeba', 512, 32, None)]
)
def test_denoisers_at_full_size(profile, width, side, weights):
    from flowerdiff.models.components import build_denoiser, scale_factor
    from flowerdiff.models.vae import kl_autoencoder

    s = load_profile(profile)
    with torch.device('meta'):
        unet, factor = (
            build_denoiser(s, 4, width, side),
            8 if profile == 'flowers102' else scale_factor(kl_autoencoder(s.encode.vae_factor)),
        )
    assert (
        side == s.prepare.resolution // factor
        and unet.config.sample_size == side
        and unet.config.cross_attention_dim == width
        and (not weights or unet.num_parameters() == weights)
    )
    assert (
        unet.config.block_out_channels == dict(flowers102=(192, 384, 576), celeba=(64, 128, 256))[profile]
        and unet.config.layers_per_block == 2
    )
