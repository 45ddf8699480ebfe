// Every compiled op's schema, in one place. The bodies are in cpu/<op>.cpp and cuda/<op>.cu; fakes and autograd
// formulas are registered in Python (sparsebert/ops/<op>.py), whose reference has the same schema.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sparsebert, m) {
  m.def("select_mask(Tensor[] scores, int num_pruned, Tensor[] weights, Tensor(a!)[] bits, Tensor(b!)[] out) -> ()");
  m.def("threshold_mask(Tensor[] scores, float threshold, Tensor[] weights, Tensor(a!)[] bits, Tensor(b!)[] out) -> ()");
  m.def("nm_mask(Tensor scores, int n, int m, float? threshold) -> Tensor");
  m.def("masked_weight(Tensor weight, Tensor bits, int[] grid, Tensor(a!) out) -> ()");
  m.def("masked_weights(Tensor[] weights, Tensor[] bits, Tensor(a!)[] out) -> ()");
  m.def(
      "masked_linear(Tensor x, Tensor weight, Tensor masked_weight, Tensor? scores, Tensor? bits, Tensor? bias, "
      "int[] grid) -> Tensor");
  m.def(
      "masked_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor masked_weight, Tensor? bits, int[] grid, "
      "bool need_x, bool need_scores, bool need_weight) -> (Tensor, Tensor, Tensor)");
  m.def(
      "split_weight_grad(Tensor product, Tensor weight, Tensor? bits, int[] grid, bool need_scores, "
      "bool need_weight) -> (Tensor, Tensor)");
  m.def(
      "unstructured_linear(Tensor x, Tensor values, Tensor offsets, Tensor rows, Tensor counts, Tensor starts, "
      "Tensor? bias, int[] shape, str activation, Tensor[] transposed) -> Tensor");
  m.def(
      "unstructured_sddmm(Tensor grad, Tensor x, Tensor offsets, Tensor rows, Tensor counts, Tensor starts) -> Tensor");
  m.def(
      "block_sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor row_starts, Tensor? bias, int[] shape, "
      "str activation, Tensor[] transposed) -> Tensor");
  m.def(
      "block_cluster_linear(Tensor x, Tensor values, Tensor columns, Tensor row_starts, Tensor? bias, int[] shape, "
      "str activation) -> Tensor");
  m.def("block_sparse_sddmm(Tensor grad, Tensor x, Tensor columns, Tensor row_starts, int[] block) -> Tensor");
  m.def(
      "semi_structured_linear(Tensor x, Tensor values, Tensor positions, Tensor? bias, int[] pattern, "
      "str activation, Tensor[] transposed) -> Tensor");
  m.def("semi_structured_pack(Tensor values, Tensor positions) -> Tensor");
  m.def(
      "semi_structured_packed_linear(Tensor x, Tensor packed, Tensor? bias, Tensor[] residue, int[] shape, "
      "str activation) -> Tensor");
  m.def(
      "bitmap_linear(Tensor x, Tensor values, Tensor bits, Tensor starts, Tensor? bias, int[] shape, "
      "str activation) -> Tensor");
  m.def("bitmap_decode(Tensor values, Tensor bits, Tensor starts, int[] shape) -> Tensor");
  m.def("bitmap_gather(Tensor dense, Tensor bits, Tensor starts, int nnz) -> Tensor");
  m.def("dense_linear(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor");
  m.def("varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale) -> Tensor");
  m.def(
      "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor columns, Tensor full_counts, Tensor counts, "
      "Tensor? partial_bits, Tensor? key_mask, Tensor? cu_seqlens, Tensor[] transposed, int[] block, float scale) "
      "-> (Tensor, Tensor)");
  m.def(
      "block_sparse_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor columns, Tensor full_counts, Tensor counts, Tensor? partial_bits, Tensor? key_mask, "
      "Tensor? cu_seqlens, Tensor[] transposed, int[] block, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def(
      "soft_cross_entropy(Tensor student_logits, Tensor teacher_logits, Tensor? mask, float temperature, "
      "bool need_grad) -> (Tensor, Tensor)");
  m.def("hidden_mse(Tensor[] student, Tensor[] teacher, Tensor? token_mask, bool need_grad) -> (Tensor, Tensor[])");
  m.def("hidden_cosine(Tensor[] student, Tensor[] teacher, Tensor? token_mask, bool need_grad) -> (Tensor, Tensor[])");
  m.def(
      "attention_kl(Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, Tensor? token_mask, "
      "float student_scale, float teacher_scale, bool need_grad) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_mse(Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, Tensor? token_mask, "
      "float student_scale, float teacher_scale, bool on_scores, bool need_grad) -> (Tensor, Tensor, Tensor)");
  m.def(
      "relation_kl(Tensor student, Tensor teacher, Tensor? token_mask, float student_scale, float teacher_scale, "
      "bool need_grad) -> (Tensor, Tensor)");
}
