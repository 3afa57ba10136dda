"""A trainer for GaLore."""

import math

from common.train.trainer import ChatTrainer


class GaloreTrainer(ChatTrainer):
    """ChatTrainer whose gradients lie in the optimizer, which knows their norm."""

    def _clip_grad_norm(self, model):
        return self.optimizer.optimizer.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:  # MAX_GRAD_NORM=0
            grad_norm = self.optimizer.optimizer.clip_grad_norm_(math.inf)
        return super()._get_grad_norm(model, grad_norm)
