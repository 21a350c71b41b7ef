/* run_corpus.c: a fuzzer's entry point over the files named on the command line, for builds without libFuzzer. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (!file || fseek(file, 0, SEEK_END)) return perror(argv[i]), 1;
        long size = ftell(file);
        if (size < 0 || fseek(file, 0, SEEK_SET)) return perror(argv[i]), 1;
        uint8_t *data = malloc((size_t)size + !size); /* exactly sized, so that a read beyond the end is seen */
        if (!data || fread(data, 1, (size_t)size, file) != (size_t)size) return perror(argv[i]), 1;
        fclose(file);
        LLVMFuzzerTestOneInput(data, (size_t)size);
        free(data);
    }
    printf("%d inputs, no failure\n", argc - 1);
    return argc < 2;
}
