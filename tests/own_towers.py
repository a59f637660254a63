"""Towers of a module of one's own, which another process can import."""

import jax
import keras


class Projected(keras.layers.Layer):
    """An embedding and a projection, in a class that is not registered."""

    def __init__(self, num_rows=30, **kwargs):
        super().__init__(**kwargs)
        self.table, self.projection = keras.layers.Embedding(num_rows, 8), keras.layers.Dense(16)

    def build(self, input_shape):
        self.table.build(input_shape)
        self.projection.build((None, 8))

    def call(self, inputs):
        return self.projection(self.table(inputs))


class OnJax(Projected):
    """A tower that TensorFlow cannot run."""

    def call(self, inputs):
        return jax.nn.relu(super().call(inputs))
