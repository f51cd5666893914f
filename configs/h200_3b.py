"""DeepSeek-V2-Lite's widths on one GPU: 6 layers, vocabulary 32768, 3.14B parameters (0.56B active).

Command:  python -m mla_jax.data.tokenizer --source=site-packages --vocab_size=32768 --output=runs/bpe32k
          python train.py --config=configs/h200_3b.py --workdir=runs/h200_3b
Hardware: one H200
Result:   103,200 to 105,300 tokens/s, 40% of 989 TFLOP/s (one run of 40 steps, about 240ed06, with
          --config.data.source=stdlib --config.data.tokenizer=byte; Hugging Face compiled: 73,200, another day's run);
          one row decodes at 732 to 758 tokens/s in bf16 (fa51ff9)
"""

from configs import deepseek_v2_lite
from mla_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RopeScaling, TrainingConfig


def model() -> ModelConfig:
  config = deepseek_v2_lite.model()
  config.num_hidden_layers, config.vocab_size = 6, 32768
  config.rope_scaling, config.max_position_embeddings = RopeScaling(), 4096
  return config


def get_config() -> Config:
  steps, batch, length = 1000, 8, 4096
  tokens = steps * batch * length
  return Config(
      model=model(),
      training=TrainingConfig(steps=steps, batch_size=batch, sequence_length=length, remat='full', eval_interval=250,
                              checkpoint_interval=500),
      optimizer=OptimizerConfig(learning_rate=4.2e-4, warmup_tokens=tokens // 20, cosine_until_tokens=tokens,
                                end_learning_rate=4.2e-5, moment_dtype='bfloat16'),
      data=DataConfig(source='site-packages', tokenizer='runs/bpe32k'))
