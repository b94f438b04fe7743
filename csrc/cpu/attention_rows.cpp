// Attention of packed sequences for one instruction set: one group of segments and one key head at
// a time, some queries at a time, whose scores stay in the cache; the backward computes them again.
#include "attention_rows.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector_loops.h"

namespace fastalign {
namespace FASTALIGN_ISA {
namespace {

// A product keeps LINES x 2 vectors of sums in registers.
#if defined(__AVX512F__)
constexpr int LINES = 12;
#else
constexpr int LINES = 6;
#endif
constexpr int64_t PANEL = 2 * WIDTH;  // columns
constexpr int64_t DEPTH = 256;        // terms of a sum between two stores of it
constexpr int64_t TILE = 64;          // rows of scores: queries times heads

int64_t rounded_up(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

// A matrix of `depth` rows for the right side of a product: PANEL columns of all rows, then the
// next; zeros fill the last panel.
struct Panels {
    float* data;
    int64_t depth;

    float* at(int64_t row, int64_t column) const {
        return data + (column / PANEL * depth + row) * PANEL + column % PANEL;
    }
    void set_row(int64_t row, const float* from, int64_t num_columns) const {
        for (int64_t column = 0; column < num_columns; column += PANEL) {
            const int64_t count = std::min(PANEL, num_columns - column);
            float* to = at(row, column);
            memcpy(to, from + column, count * sizeof(float));
            if (count < PANEL) memset(to + count, 0, (PANEL - count) * sizeof(float));
        }
    }
    void set_column(int64_t column, const float* from) const {
        for (int64_t row = 0; row < depth; ++row) *at(row, column) = from[row];
    }
};

// The left side: element (i, k) is at data[i * row + k * column].
struct Left {
    const float* data;
    int64_t row, column;
};

template <int ROWS>
void multiply_lines(const Left& left, const float* panel, int64_t depth, float* to, int64_t stride,
                    bool accumulate) {
    Float sums[ROWS][2];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < 2; ++j)
            sums[i][j] = accumulate ? Float32::load(to + i * stride + j * WIDTH) : splat(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
        const Float first = Float32::load(panel + k * PANEL);
        const Float second = Float32::load(panel + k * PANEL + WIDTH);
        for (int i = 0; i < ROWS; ++i) {
            const float factor = left.data[i * left.row + k * left.column];
            sums[i][0] = sums[i][0] + factor * first;
            sums[i][1] = sums[i][1] + factor * second;
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < 2; ++j) Float32::store(to + i * stride + j * WIDTH, sums[i][j]);
}

// to (num_rows, last - first columns) = left right, or += with `accumulate`, of rows begin..end of
// `right`; first and last are multiples of PANEL.
void multiply(const Left& left, int64_t num_rows, const Panels& right, int64_t begin, int64_t end,
              int64_t first, int64_t last, float* to, int64_t stride, bool accumulate) {
    for (int64_t start = begin; start < end; start += DEPTH) {
        const int64_t depth = std::min(DEPTH, end - start);
        const bool add = accumulate || start > begin;
        for (int64_t column = first; column < last; column += PANEL) {
            const float* panel = right.at(start, column);
            float* output = to + column - first;
            Left line = {left.data + (start - begin) * left.column, left.row, left.column};
            int64_t row = 0;
            for (; row + LINES <= num_rows; row += LINES) {
                multiply_lines<LINES>(line, panel, depth, output, stride, add);
                line.data += LINES * left.row;
                output += LINES * stride;
            }
            for (; row + 4 <= num_rows; row += 4) {
                multiply_lines<4>(line, panel, depth, output, stride, add);
                line.data += 4 * left.row;
                output += 4 * stride;
            }
            for (; row < num_rows; ++row) {
                multiply_lines<1>(line, panel, depth, output, stride, add);
                line.data += left.row;
                output += stride;
            }
        }
    }
}

// Memory that a thread keeps between its tasks.
float* scratch(int which, int64_t size) {
    static thread_local std::vector<float> memory[12];
    auto& found = memory[which];
    if (static_cast<int64_t>(found.size()) < size) found.resize(size);
    return found.data();
}

// One group of segments and one key head.
class Task {
  public:
    Task(const AttentionRows& rows, int64_t group, int64_t head)
        : rows_(rows),
          head_(head),
          num_shared_(rows.num_heads / rows.num_key_heads),
          key_size_(rows.key_size),
          value_size_(rows.value_size),
          wide_key_(rounded_up(rows.key_size)),
          wide_value_(rounded_up(rows.value_size)),
          step_(std::max<int64_t>(TILE / num_shared_, 8)),
          first_(rows.segments + rows.group_bounds[group]),
          last_(rows.segments + rows.group_bounds[group + 1]) {
        num_keys_ = 0;
        for (const auto* s = first_; s < last_; ++s) {
            num_keys_ = std::max(num_keys_, s->prompt_length + s->length);
            if (s->prompt_length > 0) prompt_start_ = s->prompt_start;
            prompt_length_ = std::max(prompt_length_, s->prompt_length);
        }
        wide_keys_ = rounded_up(num_keys_);
        most_rows_ = step_ * num_shared_;
        by_key_ = {scratch(0, key_size_ * wide_keys_), key_size_};
        memset(by_key_.data, 0, key_size_ * wide_keys_ * sizeof(float));
        values_ = {scratch(1, num_keys_ * wide_value_), num_keys_};
        scores_ = scratch(2, most_rows_ * wide_keys_);
        query_ = scratch(3, most_rows_ * key_size_);
        found_ = scratch(4, most_rows_ * std::max(wide_key_, wide_value_));
        if (!backward()) return;
        keys_ = {scratch(5, num_keys_ * wide_key_), num_keys_};
        by_value_ = {scratch(6, value_size_ * wide_keys_), value_size_};
        memset(by_value_.data, 0, value_size_ * wide_keys_ * sizeof(float));
        of_scores_ = scratch(7, most_rows_ * wide_keys_);
        of_output_ = scratch(8, most_rows_ * value_size_);
        right_ = scratch(9, most_rows_ * std::max(wide_key_, wide_value_));
        of_keys_ = scratch(10, num_keys_ * wide_key_);
        of_values_ = scratch(11, num_keys_ * wide_value_);
    }

    void run() {
        load_keys(0, prompt_start_, prompt_length_);
        for (const auto* segment = first_; segment < last_; ++segment) {
            load_keys(segment->prompt_length, segment->start, segment->length);
            for (int64_t start = 0; start < segment->length; start += step_) {
                const int64_t stop = std::min(start + step_, segment->length);
                backward() ? tile_gradients(*segment, start, stop)
                           : tile_output(*segment, start, stop);
            }
            if (backward() && segment->start != prompt_start_)
                store_gradients(segment->prompt_length, segment->start, segment->length);
        }
        if (backward() && prompt_length_ > 0) store_gradients(0, prompt_start_, prompt_length_);
    }

  private:
    bool backward() const { return rows_.grad_output != nullptr; }

    // Takes a token's keys and values as those from number `place` on; their gradients begin at 0,
    // unless they are there already: a prompt's own queries come beside its responses'.
    void load_keys(int64_t place, int64_t start, int64_t count) {
        if (place == 0 && start == prompt_start_ && loaded_prompt_) return;
        loaded_prompt_ = loaded_prompt_ || (place == 0 && start == prompt_start_);
        for (int64_t i = 0; i < count; ++i) {
            const float* key = rows_.key + (start + i) * rows_.key_stride + head_ * key_size_;
            const float* value =
                rows_.value + (start + i) * rows_.value_stride + head_ * value_size_;
            by_key_.set_column(place + i, key);
            values_.set_row(place + i, value, value_size_);
            if (!backward()) continue;
            keys_.set_row(place + i, key, key_size_);
            by_value_.set_column(place + i, value);
        }
        if (!backward()) return;
        memset(of_keys_ + place * wide_key_, 0, count * wide_key_ * sizeof(float));
        memset(of_values_ + place * wide_value_, 0, count * wide_value_ * sizeof(float));
    }

    void store_gradients(int64_t place, int64_t start, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t token = (start + i) * rows_.num_key_heads + head_;
            memcpy(rows_.grad_key + token * key_size_, of_keys_ + (place + i) * wide_key_,
                   key_size_ * sizeof(float));
            memcpy(rows_.grad_value + token * value_size_, of_values_ + (place + i) * wide_value_,
                   value_size_ * sizeof(float));
        }
    }

    // Calls visit(row, token, head) for the rows of a tile: all queries of a head, then the next.
    template <typename Visit>
    void for_each_row(const AttentionSegment& segment, int64_t start, int64_t stop,
                      const Visit& visit) const {
        int64_t row = 0;
        for (int64_t shared = 0; shared < num_shared_; ++shared)
            for (int64_t i = start; i < stop; ++i, ++row)
                visit(row, segment.start + i, head_ * num_shared_ + shared);
    }

    // The keys that any query of a tile may attend to, and the columns around them.
    void find_columns(const AttentionSegment& segment, int64_t start, int64_t stop) {
        end_ = segment.prompt_length + stop;
        begin_ = rows_.window > 0
                     ? std::max<int64_t>(0, segment.prompt_length + start - rows_.window + 1)
                     : 0;
        low_ = begin_ / PANEL * PANEL;
        high_ = rounded_up(end_);
    }

    // Writes the probabilities of a tile's keys, from column low_ on, 0 for the others.
    void probabilities(const AttentionSegment& segment, int64_t start, int64_t stop) {
        const int64_t num_rows = (stop - start) * num_shared_, width = high_ - low_;
        for_each_row(segment, start, stop, [&](int64_t row, int64_t token, int64_t head) {
            memcpy(query_ + row * key_size_,
                   rows_.query + token * rows_.query_stride + head * key_size_,
                   key_size_ * sizeof(float));
        });
        multiply({query_, key_size_, 1}, num_rows, by_key_, 0, key_size_, low_, high_, scores_,
                 width, false);
        for_each_row(segment, start, stop, [&](int64_t row, int64_t token, int64_t) {
            float* scores = scores_ + row * width;
            const int64_t own = segment.prompt_length + token - segment.start;
            const int64_t from =
                (rows_.window > 0 ? std::max<int64_t>(0, own - rows_.window + 1) : 0) - low_;
            const int64_t to = own + 1 - low_;
            softmax(scores + from, to - from);
            memset(scores, 0, from * sizeof(float));
            memset(scores + to, 0, (width - to) * sizeof(float));
        });
    }

    void softmax(float* scores, int64_t count) const {
        const float largest =
            rows_.scale < 0 ? smallest(scores, count) : row_maximum<Float32>(scores, count);
        Float sums = splat(0.0f);
        visit_vectors(0, count, [&](int64_t i, auto number) {
            const Float x = load_count<Float32>(scores + i, number, largest);
            Float e = exp((x - largest) * rows_.scale);
            store_count<Float32>(scores + i, e, number);
            for (int64_t j = number; j < WIDTH; ++j) e[j] = 0;
            sums = sums + e;
        });
        const float factor = 1.0f / sum(sums);
        visit_vectors(0, count, [&](int64_t i, auto number) {
            store_count<Float32>(scores + i, load_count<Float32>(scores + i, number) * factor,
                                 number);
        });
    }

    static float smallest(const float* scores, int64_t count) {
        return *std::min_element(scores, scores + count);
    }

    void tile_output(const AttentionSegment& segment, int64_t start, int64_t stop) {
        find_columns(segment, start, stop);
        probabilities(segment, start, stop);
        const int64_t num_rows = (stop - start) * num_shared_, width = high_ - low_;
        multiply({scores_ + begin_ - low_, width, 1}, num_rows, values_, begin_, end_, 0,
                 wide_value_, found_, wide_value_, false);
        for_each_row(segment, start, stop, [&](int64_t row, int64_t token, int64_t head) {
            memcpy(rows_.output + (token * rows_.num_heads + head) * value_size_,
                   found_ + row * wide_value_, value_size_ * sizeof(float));
        });
    }

    void tile_gradients(const AttentionSegment& segment, int64_t start, int64_t stop) {
        find_columns(segment, start, stop);
        probabilities(segment, start, stop);
        const int64_t num_rows = (stop - start) * num_shared_, width = high_ - low_;
        const Panels of_output = {right_, num_rows};
        for_each_row(segment, start, stop, [&](int64_t row, int64_t token, int64_t head) {
            const float* from = rows_.grad_output + (token * rows_.num_heads + head) * value_size_;
            memcpy(of_output_ + row * value_size_, from, value_size_ * sizeof(float));
            of_output.set_row(row, from, value_size_);
        });
        // Of the values, then of the probabilities, then of the scores.
        const int64_t shift = begin_ - low_;
        multiply({scores_ + shift, 1, width}, end_ - begin_, of_output, 0, num_rows, 0, wide_value_,
                 of_values_ + begin_ * wide_value_, wide_value_, true);
        multiply({of_output_, value_size_, 1}, num_rows, by_value_, 0, value_size_, low_, high_,
                 of_scores_, width, false);
        for (int64_t row = 0; row < num_rows; ++row)
            scores_gradient(scores_ + row * width, of_scores_ + row * width, width);
        multiply({of_scores_ + shift, width, 1}, num_rows, keys_, begin_, end_, 0, wide_key_,
                 found_, wide_key_, false);
        const Panels query = {right_, num_rows};
        for_each_row(segment, start, stop, [&](int64_t row, int64_t token, int64_t head) {
            memcpy(rows_.grad_query + (token * rows_.num_heads + head) * key_size_,
                   found_ + row * wide_key_, key_size_ * sizeof(float));
            query.set_row(row, query_ + row * key_size_, key_size_);
        });
        multiply({of_scores_ + shift, 1, width}, end_ - begin_, query, 0, num_rows, 0, wide_key_,
                 of_keys_ + begin_ * wide_key_, wide_key_, true);
    }

    // of_scores = scale p (of_p - sum p of_p); 0 where p is, whatever lies beside the keys.
    void scores_gradient(const float* p, float* of_p, int64_t count) const {
        Float sums = splat(0.0f);
        visit_vectors(0, count, [&](int64_t i, auto number) {
            sums =
                sums + load_count<Float32>(p + i, number) * load_count<Float32>(of_p + i, number);
        });
        const float along = sum(sums);
        visit_vectors(0, count, [&](int64_t i, auto number) {
            const Float x = load_count<Float32>(of_p + i, number) - along;
            store_count<Float32>(of_p + i, load_count<Float32>(p + i, number) * x * rows_.scale,
                                 number);
        });
    }

    const AttentionRows& rows_;
    const int64_t head_, num_shared_, key_size_, value_size_, wide_key_, wide_value_, step_;
    const AttentionSegment *const first_, *const last_;
    int64_t num_keys_, wide_keys_, most_rows_, prompt_start_ = -1, prompt_length_ = 0;
    int64_t begin_ = 0, end_ = 0, low_ = 0, high_ = 0;
    bool loaded_prompt_ = false;
    Panels by_key_, values_, keys_, by_value_;
    float *scores_, *query_, *found_, *of_scores_, *of_output_, *right_, *of_keys_, *of_values_;
};

}  // namespace

void run_attention(const AttentionRows& rows, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
        Task(rows, i / rows.num_key_heads, i % rows.num_key_heads).run();
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
