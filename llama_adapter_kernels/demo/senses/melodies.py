"""Melodies synthesised here: one of three instruments, going up or down, fast or slow."""

import random
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter_kernels.demo.senses.material import Material, Question, Thing

RATE, SECONDS = 16000, 2.4
SCALE = (0, 2, 4, 5, 7, 9, 11, 12, 14, 16, 17, 19, 21, 23, 24)  # two octaves, in semitones
# Overtones of each instrument and how loud they are.
INSTRUMENTS = {
    "flute": ((1, 1.0), (2, 0.12), (3, 0.03)),
    "clarinet": ((1, 1.0), (3, 0.6), (5, 0.4), (7, 0.25), (9, 0.15)),  # odd ones, as a closed pipe has
    "violin": tuple((n, 1 / n) for n in range(1, 13)),
}
TRAINING, HELD_OUT = 700, 150
QUESTIONS = (
    Question("Which instrument is this?", lambda truth: f"A {truth[0]}."),
    Question("Does the melody go up or down?", lambda truth: "Up." if truth[1] else "Down."),
    Question("Is it fast or slow?", lambda truth: "Fast." if truth[2] else "Slow."),
)


def material(folder: Path, progress: Any, training: int = TRAINING, held_out: int = HELD_OUT) -> Material:
    """Writes the sounds into `folder`."""
    import soundfile

    sounds = folder / "sounds"
    sounds.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    things = []
    for number in range(training + held_out):
        truth = (chance.choice(list(INSTRUMENTS)), chance.random() < 0.5, chance.random() < 0.5)
        path = sounds / f"{number:04d}.wav"
        soundfile.write(path, melody(*truth, chance), RATE)
        things.append(Thing(path, truth))
        progress((number + 1) / (training + held_out))
    blank = sounds / "blank.wav"
    soundfile.write(blank, _noise(int(RATE * SECONDS), chance), RATE)
    return Material(
        "audio", "A LLaMA that hears melodies", things[:training], things[training:], QUESTIONS, blank, "log-mel",
        "There is no encoder: the conditioning module reads a log-mel spectrogram.", "queries",
        (("inner_size", 64), ("blocks", 2), ("heads", 4)),
    )  # fmt: skip


def melody(instrument: str, upwards: bool, fast: bool, chance: random.Random) -> np.ndarray:
    """[samples] float32: twelve notes or four, from a random root, on a soft noise."""
    notes = 12 if fast else 4
    stride = 1 if fast else chance.choice((2, 3))
    first = chance.randrange(3)
    degrees = [SCALE[first + note * stride] for note in range(notes)]
    root = 220.0 * 2 ** (chance.randrange(-5, 8) / 12)
    samples = int(RATE * SECONDS / notes)
    tones = [_tone(root * 2 ** (d / 12), samples, instrument) for d in (degrees if upwards else degrees[::-1])]
    played = np.concatenate(tones)
    return np.asarray(0.2 * played + _noise(len(played), chance), dtype=np.float32)


def _tone(pitch: float, samples: int, instrument: str) -> np.ndarray:
    time = np.arange(samples) / RATE
    bent = time + 1.7e-4 * np.sin(2 * np.pi * 5.5 * time) if instrument == "violin" else time  # vibrato
    parts = INSTRUMENTS[instrument]
    wave = sum(loud * np.sin(2 * np.pi * pitch * n * bent) for n, loud in parts if pitch * n < 7500)
    envelope = np.minimum(1, np.minimum(time / 0.02, (samples / RATE - time) / 0.04))
    return np.asarray(wave * envelope / np.sqrt(sum(loud**2 for _, loud in parts)))


def _noise(samples: int, chance: random.Random) -> np.ndarray:
    return np.asarray(0.01 * np.random.default_rng(chance.randrange(1 << 30)).standard_normal(samples))
