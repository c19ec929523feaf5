"""EANet on PASCAL VOC 2012 (Guo et al., 2021, section 4)."""

from ..tasks._recipes.segmentation import MaskData, Recipe
from ..train.recipe import Optim

__all__ = ["eanet_voc"]

RUNS = {f"eanet_voc_resnet{layers}": (f"eanet_resnet{layers}",) for layers in (50, 101)}


def eanet_voc(network: str) -> Recipe:
    """External Attention behind a dilated ResNet, on the 10,582 images of PASCAL VOC's trainaug.

        sansmax train eanet_voc_resnet101 --data.root VOCdevkit/VOC2012 --weights resnet101-2a57e44d.pth
        sansmax eval sansmax-run --scales 0.5 0.75 1 1.25 1.5 1.75 --eval-flip

    The second command looks at six sizes and their mirror images, as the published test does; validation
    looks at the image as it is. `--weights` should be the authors' ImageNet file of the backbone; `--weights
    pretrained` fetches timm's resnet50s or resnet101s.

    Cost: 4 GPUs; which, and hours: not stated. Not measured here.
    To reach: mIoU not found for VOC's validation images; PASCAL VOC's test server has a published entry whose
    figure is not found either. EMANet-101, whose pipeline this is, reaches 80.05 (81.32 with sizes and mirror
    images) on validation images. External Attention on ADE20K (ResNet-101): 45.33.

    Source: published code MenghaoGuo/EANet, settings.py, train_torch.py, test_torch.py; data as in
    XiaLiPKU/EMANet, dataset.py, which the author names.
    Differences:
    - 68 epochs of 661 updates are 44,948, not 45,000, and the rate falls over those.
    - The image is normalised by ImageNet's mean and deviation; EMANet's dataset.py divides by the mean.
    - Of a resumed run the schedule goes on; the published one begins anew.
    """
    return Recipe(
        model=network,
        decoder="",
        crop_size=(513, 513),
        rescale=(0.5, 2.0),
        hflip=0.5,
        loss="pixels",
        epochs=68,
        batch_size=16,
        seed=66,
        data=MaskData(root="VOCdevkit/VOC2012", split="trainaug"),
        optim=Optim(
            opt="momentum",
            lr=9e-3,
            lr_batch=None,
            weight_decay=1e-4,
            momentum=0.9,
            sched="poly",
            per="update",
            hold=10,
            warmup=0,
            min_lr=0.0,
        ),
    )
