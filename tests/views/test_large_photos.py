"""Photos as cameras make them, through a server of default limits and through the embedded one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from server_fixtures import running_server
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as T

from genssl import GenerativeViews, VariantClient
from genssl.client.images import stored_image
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import RequestRefusedError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.offline.pregenerate import pregenerate
from genssl.server.codec import Failure, check_source, decode_source
from genssl.training.supply.server import server_file
from genssl.variants.engine import VariantEngine

ROOT = Path(__file__).resolve().parents[2]


def save_photos(root: Path, size: tuple[int, int], count: int) -> list[Path]:
    paths = []
    for number in range(count):
        paths.append(root / f"class-{number % 2}" / f"{number}.jpg")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        small = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BILINEAR).save(paths[-1], quality=70)
    return paths


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("photos")
    return root, save_photos(root, (4000, 3000), 4)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with running_server(tmp_path_factory.mktemp("server")) as server:
        server.wait_until_serving()
        yield server.address


def test_the_loop_of_the_readme_takes_photos(address, photos):
    augment = T.Compose([T.RandomResizedCrop(32, (0.2, 1.0)), T.ToTensor()])
    views = GenerativeViews(datasets.ImageFolder(photos[0]), address, transform=augment)
    seen = [(view1.shape, view2.shape, len(labels)) for view1, view2, labels in DataLoader(views, 2, shuffle=True)]
    assert seen == [((2, 3, 32, 32), (2, 3, 32, 32), 2)] * 2
    assert views.origins["real"] == 0
    assert sum(views.origins.values()) == 4
    views.close()


@pytest.mark.slow
def test_pictures_arrays_and_paths_of_photos_are_taken_and_alike(address, photos):
    _, paths = photos
    pictures = [Image.open(path).convert("RGB") for path in paths]
    with VariantClient(address) as client:
        from_pictures = client.variants(pictures, 3)
        from_arrays = client.variants([np.array(picture) for picture in pictures], 3)
        from_paths = client.variants(paths, 3)
        from_opened = client.variants([Image.open(path) for path in paths], 3)
    assert from_arrays.source_ids == from_pictures.source_ids
    assert np.array_equal(from_arrays.images, from_pictures.images)
    assert from_opened.source_ids == from_paths.source_ids != from_pictures.source_ids
    # Another source has other noise, so the variants are not compared; that its shape is kept says it was generated.
    assert from_paths.images.shape == from_pictures.images.shape


def test_a_refusal_names_the_setting(address, tmp_path):
    (path,) = save_photos(tmp_path, (6000, 4000), 1)
    with VariantClient(address) as client:
        with pytest.raises(
            RequestRefusedError,
            match=r"6000 x 4000 pixels; the limit is 16,000,000 in all \(limits.max_image_pixels of the server file\)",
        ):
            client.variants([path])
        assert client.variants([Image.open(path)]).images.shape[0] == 1, "as pixels it is shrunk"


def test_the_embedded_server_takes_what_the_reader_takes(unclip, tmp_path):
    (path,) = save_photos(tmp_path, (6000, 4000), 1)
    recipe = load(Recipe, ROOT / "recipes" / "simclr_sd.yaml")
    limits = server_file(recipe, 1).limits
    stored = stored_image(path)
    source = pb.SourceImage(digest=stored.source_id, data=stored.data, encoding=pb.IMAGE_ENCODING_FILE)
    engine = VariantEngine(unclip, [1])
    assert check_source(source, limits) == 6000 * 4000
    assert not isinstance(decode_source(source, engine, limits), Failure)
    low = limits.model_copy(update={"max_image_bytes": 2**10})
    refused = check_source(source, low)
    assert isinstance(refused, Failure)
    assert refused.message.endswith("the limit is 1,024 (limits.max_image_bytes of the server file)")


@pytest.mark.slow
def test_a_folder_of_large_photos_is_pregenerated_by_the_embedded_server(tmp_path):
    save_photos(tmp_path / "photos", (6000, 4000), 4)
    recipe = load(
        Recipe,
        ROOT / "recipes" / "simclr_sd.yaml",
        [
            f"dataset={{name: folder, root: {tmp_path / 'photos'}, image_size: 8, test_fraction: 0.4}}",
            "variants.source=online",
            "train.batch_size=2",
            "evaluate=[]",
        ],
    )

    class Quiet:
        def note(self, text: str) -> None: ...
        def start(self, done) -> None: ...
        def advance(self, done) -> None: ...

    done = pregenerate(recipe, tmp_path / "store", variants=1, report=Quiet())
    assert done.made == done.total > 0
