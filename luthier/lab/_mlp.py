"""A small perceptron for digits in the shape of a transformers image classifier, so that recipes can tune it."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class PerceptronConfig(PretrainedConfig):
    model_type = "lab-perceptron"

    def __init__(self, widths: tuple[int, ...] = (128, 128, 128), image_size: int = 8, num_channels: int = 1, **kw) -> None:
        self.widths, self.image_size, self.num_channels = list(widths), image_size, num_channels
        super().__init__(**kw)


class PerceptronForImageClassification(PreTrainedModel):
    """Pixels, hidden layers `layers.0`, `layers.1` ... with ReLU, and a linear `classifier`."""

    config_class = PerceptronConfig
    main_input_name = "pixel_values"

    def __init__(self, config: PerceptronConfig) -> None:
        super().__init__(config)
        sizes = [config.num_channels * config.image_size**2, *config.widths]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)

    def hidden(self, pixel_values: Tensor) -> Tensor:
        """What the classifier sees."""
        x = pixel_values.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return x

    def forward(self, pixel_values: Tensor, **_) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.classifier(self.hidden(pixel_values)))


AutoConfig.register(PerceptronConfig.model_type, PerceptronConfig, exist_ok=True)
AutoModelForImageClassification.register(PerceptronConfig, PerceptronForImageClassification, exist_ok=True)


def perceptron(fields: dict) -> nn.Module:
    return PerceptronForImageClassification(PerceptronConfig(**{"num_labels": 10, **fields}))
