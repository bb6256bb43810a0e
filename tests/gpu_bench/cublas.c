/* Stands for cuBLAS where there is none: takes products of row-major matrices in bf16 and nothing else, and computes
 * nothing. */

#include <stddef.h>

/* What a right product answers. */
#ifndef ANSWER
#define ANSWER 0
#endif

static int handle;

int cublasCreate_v2(void **created) {
    *created = &handle;
    return 0;
}

int cublasSetStream_v2(void *of, void *stream) { return of == &handle && stream != NULL ? 0 : 7; }

int cublasDestroy_v2(void *of) { return of == &handle ? 0 : 7; }

int cublasGemmEx(
    void *of, int transposed_a, int transposed_b, int m, int n, int k, const float *alpha, const void *a, int type_a,
    int lda, const void *b, int type_b, int ldb, const float *beta, void *c, int type_c, int ldc, int compute,
    int algorithm) {
    int are_types = type_a == 14 && type_b == 14 && type_c == 14 && compute == 68 && algorithm == -1;
    int are_sizes = m > 0 && n > 0 && k > 0 && lda == k && ldb == k && ldc == m;
    int is_plain = of == &handle && transposed_a == 1 && transposed_b == 0 && *alpha == 1 && *beta == 0;
    return are_types && are_sizes && is_plain && a != NULL && b != NULL && c != NULL ? ANSWER : 7;
}
