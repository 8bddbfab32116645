"""Every key, once, with what it means; the built-in touching cells on two CPU cores.

    python train.py --config=configs/default.py --workdir=runs/cells

Measured on two CPU cores: Dice of the cells 0.980 on the 32 validation images after
75 s (0.960 after 30 s); the first step is done 12 s after the command, and 6 s when
it is run again.

A key that is ``None`` leaves the choice to the part that reads it, whose docstring
names its default. Override any key on the command line: ``--config.model.norm=group``.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The config; other files call this and change a few lines."""
    config = ConfigDict()
    config.seed = 0  # of parameters, order, crops, augmentation and dropout
    config.task = "classes"  # classes (softmax) | labels (sigmoid)

    config.data = data = ConfigDict()  # unet_jax.data.build
    data.source = "cells"  # cells | folder | volumes | ctc | coco | nnunet | tfds
    data.root = ""  # where the files are
    data.train = "train"  # a split: train[:80%], train[20:30], all[not fold 2/5]
    data.evaluation = "val"
    data.normalisation = "auto"  # auto | range | standard | example
    data.cache_mb = 500.0  # decoded examples kept in memory
    data.cache_dir = ""  # or in this folder, if they are more than the memory holds
    data.on_error = "stop"  # stop | skip: at a file that cannot be read
    data.links = False  # whether files may be links that lead out of the root
    data.resize = ()  # bring every example to this size, () for none
    data.border = ConfigDict()  # unet_jax.data.border.Bordered, of the training part
    data.border.w0 = placeholder(float)  # the paper's 10 turns the weight map on
    data.border.sigma = placeholder(float)
    data.border.balance = placeholder(bool)  # weigh each class by how rare it is
    data.border.gap = placeholder(bool)  # a background pixel between touching objects
    data.border.spacing = placeholder(tuple)  # size of a pixel along each axis
    data.border.most = placeholder(float)  # the largest weight of a class
    data.border.cache = placeholder(str)  # a folder, or none
    data.cells = ConfigDict()  # unet_jax.data.cells.open
    data.cells.size = placeholder(tuple)
    data.cells.examples = placeholder(int)
    data.cells.rank = placeholder(int)  # 2 or 3
    data.cells.seed = placeholder(int)
    data.cells.radius = placeholder(tuple)  # of the cells, smallest and largest
    data.cells.crowding = placeholder(float)
    data.cells.noise = placeholder(float)
    data.cells.gap = placeholder(bool)  # a pixel of background between touching cells
    data.folder = ConfigDict()  # unet_jax.data.folder.open
    data.folder.images = placeholder(str)  # a folder, a glob, or images/{split}
    data.folder.masks = placeholder(str)
    data.folder.label_masks = placeholder(tuple)  # (("vessel", "masks/vessel"), ...)
    # auto | binary | index | instances | objects | colors | planes
    data.folder.mask = placeholder(str)
    data.folder.colors = placeholder(tuple)
    data.folder.label_names = placeholder(tuple)
    data.folder.channels = placeholder(int)
    data.folder.ignore = placeholder(int)
    data.volumes = ConfigDict()  # unet_jax.data.volumes.open
    data.volumes.images = placeholder(str)
    data.volumes.masks = placeholder(str)
    data.volumes.slices = placeholder(bool)  # 2-D slices, or one volume
    data.volumes.mask = placeholder(str)
    data.volumes.label_names = placeholder(tuple)
    data.volumes.channels = placeholder(int)
    data.volumes.spacing = placeholder(tuple)  # resample volumes to this voxel size
    data.volumes.colors = placeholder(tuple)
    data.volumes.ignore = placeholder(int)
    data.ctc = ConfigDict()  # unet_jax.data.ctc.open
    data.ctc.sequences = placeholder(tuple)  # of the split `all`, such as ("01",)
    data.ctc.truth = placeholder(str)  # GT | ST: gold or silver
    data.ctc.label_names = placeholder(tuple)
    data.ctc.complete = placeholder(bool)  # whether every cell has a mask
    data.ctc.unknown = placeholder(float)  # pixels not counted around one without
    data.ctc.spacing = placeholder(tuple)  # size of a pixel along each axis
    data.ctc.channels = placeholder(int)
    data.coco = ConfigDict()  # unet_jax.data.coco.open
    data.coco.annotations = placeholder(str)  # a JSON file under root
    data.coco.images = placeholder(str)  # the folder of its file names
    data.coco.label_names = placeholder(tuple)  # of the categories that count
    data.coco.overlap = placeholder(bool)  # a plane for each label (task labels)
    data.coco.channels = placeholder(int)
    data.nnunet = ConfigDict()  # unet_jax.data.nnunet.open
    data.nnunet.slices = placeholder(bool)  # 2-D slices, or one volume
    data.nnunet.spacing = placeholder(tuple)  # resample volumes to this voxel size
    data.nnunet.regions = placeholder(bool)  # labels that overlap, as the JSON has them
    data.tfds = ConfigDict()  # unet_jax.data.tfds.open
    data.tfds.name = placeholder(str)
    data.tfds.image = placeholder(str)  # names of the features
    data.tfds.mask = placeholder(str)
    data.tfds.label_names = placeholder(tuple)
    data.tfds.values = placeholder(str)  # what the mask's values are, as folder.mask
    data.tfds.shift = placeholder(int)  # subtracted from mask values
    data.tfds.ignore = placeholder(int)
    data.tfds.channels = placeholder(int)
    data.tfds.data_dir = placeholder(str)
    data.tfds.manual_dir = placeholder(str)

    config.augment = augment = ConfigDict()  # unet_jax.augment.build
    augment.flip = True
    augment.flip_axes = ()  # along these spatial axes only
    augment.quarter_turns = True
    augment.rotate = 0.0  # degrees, either way
    augment.scale = 0.0  # 0.25: by a factor of 1/1.25 to 1.25
    augment.shift = 0.0  # part of the size, either way
    augment.rotate_3d = placeholder(bool)  # about all three axes
    augment.elastic = placeholder(object)  # pixels; the paper's is 10. Or one an axis
    augment.elastic_grid = placeholder(int)  # nodes along each axis of the crop
    augment.elastic_method = placeholder(str)  # cubic | linear | dense
    augment.elastic_sigma = placeholder(float)  # pixels that dense is smoothed over
    augment.interpolation = placeholder(str)  # of the image: linear | cubic
    augment.probability = placeholder(float)  # of rotation, scale, shift; of elastic
    augment.brightness = 0.0
    augment.contrast = 0.0
    augment.gamma = 0.0
    augment.noise = 0.0

    config.model = model = ConfigDict()  # unet_jax.models.build
    model.name = "unet"  # a net of unet_jax.models.MODELS; the keys below change it
    model.weights = placeholder(str)  # instead: a workdir or PyTorch file to start from
    model.encoder_weights = placeholder(str)  # of torchvision, for encoder = resnet...
    model.features = (16, 32, 64, 128)  # channels of each level, finest first
    model.decoder_features = placeholder(tuple)
    model.encoder = placeholder(str)  # plain | resnet18 | resnet34 | resnet50 ...
    model.bottleneck = placeholder(str)  # none | transformer
    model.decoder = placeholder(str)  # unet | unetpp
    model.block = placeholder(str)  # plain | residual | preactivation | recurrent ...
    model.decoder_block = placeholder(str)
    model.down = placeholder(str)  # max | average | strided
    model.up = placeholder(str)  # transpose | bilinear | nearest | pixel_shuffle ...
    model.up_features = placeholder(object)  # level | input | a number for each level
    model.up_bias = placeholder(bool)
    model.fit = placeholder(str)  # zeros | edge | resize | crop: of odd sizes
    model.merge = placeholder(str)  # concat | sum | gated | gated_full | none ...
    model.padding = placeholder(str)  # same | valid | reflect
    model.kernels = placeholder(tuple)  # of each level, such as ((1, 3, 3), 3, 3)
    model.decoder_kernels = placeholder(tuple)  # likewise of the decoder's levels
    model.strides = placeholder(tuple)  # from each level to the next
    model.units = placeholder(tuple)  # convolutions of each level's block
    model.decoder_units = placeholder(tuple)
    model.norm = placeholder(str)  # batch | instance | group | none ...
    model.norm_groups = placeholder(int)
    model.order = placeholder(str)  # of convolution, norm, activation: cna, can, nca
    model.act = placeholder(str)  # relu | leaky_relu | prelu | elu | gelu | silu
    model.act_slope = placeholder(float)
    model.excite = placeholder(str)  # none | se | scse
    model.dropout = placeholder(float)
    model.dropout_levels = placeholder(int)
    model.conv_bias = placeholder(bool)
    model.kernel_init = placeholder(str)
    model.head_kernel = placeholder(int)
    model.head_bias = placeholder(bool)
    model.deep_supervision = placeholder(bool)
    model.heads = placeholder(int)  # how many levels of a U-Net then have one
    model.level = placeholder(int)  # unetpp: cut off after this level
    # Levels to compute again in the backward pass; -1: as few as fit the memory.
    model.remat = placeholder(int)
    model.dtype = placeholder(str)  # float32 | bfloat16

    config.loss = loss = ConfigDict()  # unet_jax.losses.build
    loss.cross_entropy = 1.0
    loss.binary_cross_entropy = 0.0
    loss.dice = 1.0
    loss.tversky = 0.0
    loss.focal = 0.0
    loss.class_weights = ()
    loss.normalise = placeholder(str)  # pixels | weights
    loss.smooth = placeholder(float)
    loss.over = placeholder(str)  # image | batch
    loss.background = placeholder(bool)
    loss.micro = placeholder(bool)  # one Dice of all classes together
    loss.squared = placeholder(bool)
    loss.gamma = placeholder(float)
    loss.focal_alpha = placeholder(tuple)
    loss.alpha = placeholder(float)  # of tversky
    loss.beta = placeholder(float)

    config.optim = optim = ConfigDict()  # unet_jax.optim.build
    optim.name = "adamw"  # sgd | rmsprop | adam | adamw
    optim.learning_rate = 3e-3
    optim.schedule = "cosine"  # constant | cosine | poly | plateau
    optim.warmup_steps = 20
    optim.power = placeholder(float)
    optim.final_fraction = placeholder(float)
    optim.momentum = placeholder(float)  # of sgd and rmsprop
    optim.nesterov = placeholder(bool)  # of sgd
    optim.betas = placeholder(tuple)  # of adam and adamw
    optim.alpha = placeholder(float)  # of rmsprop
    optim.eps = placeholder(float)
    optim.weight_decay = 1e-4
    optim.decay_all = placeholder(bool)  # biases and norms too, as PyTorch does
    optim.clip = 1.0  # largest gradient norm, 0 for none
    optim.freeze = ()  # patterns of parameter paths, such as ("encoder", "**/norm*")
    optim.lr_scale = placeholder(tuple)  # such as (("encoder", 0.1), ("head", 10.0))

    config.plateau = plateau = ConfigDict()  # for optim.schedule = "plateau"
    plateau.monitor = "loss"  # a figure of the evaluation that should fall
    plateau.factor = 0.5
    plateau.patience = 10  # evaluations

    config.train = train = ConfigDict()
    train.steps = 300
    # The effective one, over devices and accumulation; 0: the largest that fits.
    train.batch_size = 8
    train.memory_gb = 0.0  # of a device, to fit into; 0: what the device says
    train.accumulate = 1  # microbatches a step
    train.steps_per_call = 1  # steps a dispatch; divides all that happens every so many
    train.crop = (128, 128)  # the net's input size in training
    train.foreground = 0.0  # part of the crops that hold foreground for certain
    train.threads = 0  # that read batches ahead; 0: one a core, at most 8
    # Training images kept on the device and cropped there; None: on an accelerator of
    # which they take at most a tenth.
    train.resident = placeholder(bool)
    train.ema = 0.0  # decay of the parameters' average, 0 for none
    train.log_every = 10
    train.eval_every = 100
    train.save_every = 100
    train.eval_batch_size = 8
    train.threshold = 0.5  # from which probability a label counts (task labels)
    train.monitor = "dice"  # the figure that decides which checkpoint is best
    train.patience = 0  # evaluations without a better one before stopping, 0: never
    train.alarm = 3  # evaluations in a row that find one class only; 0: never

    config.mesh = mesh = ConfigDict()  # unet_jax.sharding.make_mesh
    mesh.data = -1  # parts that a batch is split into, -1 for as many as there can be
    mesh.space = 1  # parts that every image is split into, along its first axis
    mesh.fsdp = False  # split parameters and optimizer state over the devices, too
    mesh.pmap = False  # the same step under jax.pmap, for those who are built on it

    config.members = members = ConfigDict()  # unet_jax.members: several nets at once
    members.folds = 0  # of a cross-validation of data.train, which must be a bare name
    members.seeds = 0  # nets of an ensemble: from seed on
    members.vmap = placeholder(bool)  # as one program, or in turn; None: by backend
    return config
