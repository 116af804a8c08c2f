"""From a stored request to the engine's: the same fields, with the input image on local disk."""

from pathlib import Path

from engine.config import GenerationRequest, LoraUse
from engine.specs import parse_size
from jobs.job import Job
from jobs.storage import ObjectStore


def engine_request(job: Job, folder: Path, storage: ObjectStore) -> GenerationRequest:
    """The engine's request for a job; an input image is downloaded into `folder`.

    Raises FileNotFoundError when the image is gone, StorageUnavailable when S3 is away.
    """
    asked = job.request
    image = None
    if asked.image is not None:
        image = folder / ("input" + Path(asked.image).suffix)
        storage.get_file(asked.image, image)
    return GenerationRequest(
        prompt=asked.prompt,
        size=parse_size(asked.size),
        frame_num=asked.frame_num,
        shift=asked.shift,
        sampling_steps=asked.sampling_steps,
        guide_scale=asked.guide_scale,
        seed=asked.seed,
        solver=asked.sample_solver,
        negative_prompt=asked.negative_prompt,
        image=image,
        loras=tuple(LoraUse(lora.name, lora.strength, lora.expert) for lora in asked.loras),
        quality=asked.quality,
    )
